"""How much a session may send, and how long either side waits."""

from dataclasses import dataclass

from capstan.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one server or one session.

    `beat_s` is how often a silent connection is tried, and how long the answer may take; then it is lost. A
    session that asks nothing for `idle_s` is closed. `max_sessions` are connected at once; of as many the
    last answer is kept.
    """

    max_message_bytes: int = 64 * 2**20
    beat_s: float = 10.0
    idle_s: float = 600.0
    max_sessions: int = 256

    def __post_init__(self) -> None:
        if min(self.max_message_bytes, self.beat_s, self.idle_s, self.max_sessions) <= 0:
            raise UsageError(f"All limits of a session are above 0, found {self}.")

    def grpc_options(self) -> list[tuple[str, int]]:
        """The same for gRPC."""
        beat_ms = max(1, int(self.beat_s * 1e3))
        return [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", beat_ms),
            ("grpc.keepalive_timeout_ms", beat_ms),
            ("grpc.http2.ping_timeout_ms", beat_ms),  # a minute by default, whatever keepalive says
            # Else gRPC stops to ping, or hangs up on who pings, while one side computes and nothing crosses.
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.max_ping_strikes", 0),
        ]
