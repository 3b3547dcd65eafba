"""The client's side: ask, wait, and ask again under the same number when the connection is lost."""

import secrets
import time
from queue import SimpleQueue
from threading import Timer
from typing import Any, NamedTuple

from capstan.errors import InputError, TimeoutExpired, UsageError, require_extra
from capstan.transport.ledger import Ledger
from capstan.transport.sessions.envelope import ENVELOPE_BYTES, Envelope, Kind, seal, unseal
from capstan.transport.sessions.limits import Limits
from capstan.transport.sessions.security import Security
from capstan.transport.sessions.server import METHOD, SERVICE

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class _Stream(NamedTuple):
    """A connection: what is put into `requests` is sent; None ends it."""

    call: Any
    requests: SimpleQueue[bytes | None]


class Session:
    """One side of a conversation with a `SessionServer`, of a single thread.

    Args:
        address: HOST:PORT of the server.
        name: for the server's messages and ledger, such as "device 3".

    Raises:
        UsageError: the address is none, or it needs certificates and a token.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str,
        security: Security | None = None,
        limits: Limits | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        require_extra("federation", "grpc")
        import grpc

        self._grpc, self.address, self.name = grpc, address, name
        self._security, self._limits = security or Security(), limits or Limits()
        self._host, self._port = _host_and_port(address)
        self._security.check_address(self._host)
        self.ledger = ledger or Ledger()
        self._number = 0
        self._stream: _Stream | None = None
        self._metadata = (
            ("capstan-session", secrets.token_hex(16)),
            ("capstan-name", name),
            *self._security.metadata(),
        )
        # Connections of its own, that are tried again soon, and never through a proxy of the environment.
        options = [
            *self._limits.grpc_options(),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", int(_FIRST_PAUSE_S * 1e3)),
            ("grpc.min_reconnect_backoff_ms", int(_LONGEST_PAUSE_S * 1e3)),
            ("grpc.max_reconnect_backoff_ms", int(_LONGEST_PAUSE_S * 1e3)),
        ]
        if self._security.has_certificate:
            credentials = self._security.channel_credentials(grpc)
            self._channel = grpc.secure_channel(address, credentials, options=options)
        else:
            self._channel = grpc.insecure_channel(address, options=options)
        self._converse = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")

    def ask(self, request: bytes, *, timeout_s: float) -> bytes:
        """The server's answer; the request is applied once, however often the connection is lost.

        After `TimeoutExpired` it is not known whether it was applied: begin a new session.

        Raises:
            InputError: the server refuses the request, or this session.
            TimeoutExpired: there is no answer within `timeout_s`.
        """
        if len(request) + ENVELOPE_BYTES > self._limits.max_message_bytes:
            raise InputError(
                f"A message for {self.address} may have {self._limits.max_message_bytes} bytes, found "
                f"{len(request) + ENVELOPE_BYTES}. Send less at once, or raise the limit on both sides."
            )
        self._number += 1
        message = seal(Envelope(Kind.REQUEST, self._number, request))
        until_s, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        lost = "it did not answer"
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                return self._exchange(message, left_s)
            except self._grpc.RpcError as error:
                self._drop()
                if error.code() in self._refusals():
                    raise InputError(f"{self.address} refuses {self.name}: {error.details()}") from error
                if error.code() is not self._grpc.StatusCode.CANCELLED:
                    lost = error.details()
                if self._security.has_certificate:
                    self._security.check_handshake(self._host, self._port)
            except StopIteration:
                self._drop()
                lost = "it ended the connection"
            time.sleep(max(0.0, min(pause_s, until_s - time.monotonic())))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise TimeoutExpired(f"{self.address} did not answer {self.name} within {timeout_s:g} s: {lost}.")

    def close(self) -> None:
        """End the connection."""
        self._drop()
        self._channel.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, message: bytes, timeout_s: float) -> bytes:
        if self._stream is None:
            requests: SimpleQueue[bytes | None] = SimpleQueue()
            self._stream = _Stream(
                self._converse(iter(requests.get, None), metadata=self._metadata), requests
            )
        expiry = Timer(timeout_s, self._stream.call.cancel)
        expiry.daemon = True
        expiry.start()
        try:
            self._stream.requests.put(message)
            self.ledger.count(f"{self.name}->server", "session", len(message))
            answer: bytes = next(self._stream.call)
        finally:
            expiry.cancel()
        self.ledger.count(f"server->{self.name}", "session", len(answer))
        envelope = unseal(answer, sender=self.address)
        if envelope.number != self._number or envelope.kind is Kind.REQUEST:
            raise InputError(
                f"Wanted {self.address}'s answer to request {self._number}, found "
                f"{envelope.kind.name.lower()} {envelope.number}."
            )
        if envelope.kind is Kind.REFUSAL:
            raise InputError(
                f"{self.address} refuses {self.name}: {envelope.payload.decode(errors='replace')}"
            )
        return envelope.payload

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.call.cancel()
            self._stream.requests.put(None)  # lets gRPC's thread go that waits for more
            self._stream = None

    def _refusals(self) -> tuple[object, ...]:
        status = self._grpc.StatusCode
        return (
            status.UNAUTHENTICATED,
            status.INVALID_ARGUMENT,
            status.FAILED_PRECONDITION,
            status.RESOURCE_EXHAUSTED,
            status.UNIMPLEMENTED,
        )


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(f"Wanted the server as HOST:PORT, found {address!r}.")
    return host, int(port)
