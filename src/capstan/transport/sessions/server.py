"""The server's side: sessions ask, a function answers; what is wrong ends one stream, never the server."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

from capstan.errors import CapstanError, DeviceError, InputError, TimeoutExpired, UsageError, require_extra
from capstan.transport.ledger import Ledger
from capstan.transport.sessions.envelope import Envelope, Kind, seal, unseal
from capstan.transport.sessions.limits import Limits
from capstan.transport.sessions.numbering import NumberedAnswers
from capstan.transport.sessions.security import Security

SERVICE, METHOD = "capstan.Sessions", "Converse"
_log = logging.getLogger(__name__)
_LOOK_S = 0.5


class Peer(NamedTuple):
    """Who asks: the name that it gave itself, its session, and the address that it comes from."""

    name: str
    session: str
    address: str

    def __str__(self) -> str:
        return f"{self.name!r} at {self.address}"


@dataclass(eq=False)
class _Stream:
    """One connection of a session."""

    peer: Peer
    context: Any
    last_asked_s: float
    is_waiting: bool = True  # for the peer to ask


@dataclass(eq=False)
class _Record:
    """What is kept of a session while it is not connected."""

    answers: NumberedAnswers[Envelope] = field(default_factory=NumberedAnswers)
    stream: _Stream | None = None


class SessionServer:
    """Serves sessions until it is closed.

    Args:
        handle: gives the answer of one request, in a thread of the session's; what it raises of Capstan's
            errors is told to the peer, whose session goes on. It must not wait without bound.
        host: of the address to bind; others than loopback want `security` with certificates and token.
        port: 0 finds a free one, see `port`.
        on_lost: called when a session's connection has gone.
        answer_s: how long a repeated request waits for the first one's answer.

    Raises:
        UsageError: the address needs certificates and a token.
        DeviceError: the address cannot be bound.
    """

    def __init__(
        self,
        handle: Callable[[Peer, bytes], bytes],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        security: Security | None = None,
        limits: Limits | None = None,
        ledger: Ledger | None = None,
        on_lost: Callable[[Peer], None] | None = None,
        answer_s: float = 60.0,
    ) -> None:
        require_extra("federation", "grpc")
        import grpc

        self._grpc, self._handle, self._on_lost, self._answer_s = grpc, handle, on_lost, answer_s
        self._security, self._limits = security or Security(), limits or Limits()
        self._security.check_address(host)
        self.ledger = ledger or Ledger()
        self._lock, self._records = Lock(), OrderedDict[str, _Record]()
        self._closing = Event()
        self._server = self._bound(host, port)
        self._watch = Thread(target=self._close_idle_streams, name="capstan sessions", daemon=True)
        self._watch.start()
        self._server.start()

    def _bound(self, host: str, port: int) -> Any:
        grpc, most = self._grpc, self._limits.max_sessions
        server = grpc.server(
            ThreadPoolExecutor(most + 1, thread_name_prefix="capstan session"),
            options=[*self._limits.grpc_options(), ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=most,
        )
        converse = grpc.stream_stream_rpc_method_handler(self._converse)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: converse}),))
        address = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
        try:
            if self._security.has_certificate:
                credentials = self._security.server_credentials(grpc)
                self.port: int = server.add_secure_port(address, credentials)
            else:
                self.port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise DeviceError(
                f"{address} cannot be served: it is taken or not this machine's, or key and certificate do "
                "not belong together. Take another port, or 0 for a free one."
            ) from error
        return server

    def close(self, grace_s: float = 1.0) -> None:
        """Take no more requests; what is under way has `grace_s`."""
        self._closing.set()
        self._server.stop(grace_s).wait(grace_s + 10)
        self._watch.join(10)

    def __enter__(self) -> "SessionServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- a stream ------------------------------------------------------------------------------------

    def _converse(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        status = self._grpc.StatusCode
        metadata = dict(context.invocation_metadata())
        if not self._security.admits(metadata):
            context.abort(status.UNAUTHENTICATED, "The token is not the server's.")
        peer = Peer(
            str(metadata.get("capstan-name", "")), str(metadata.get("capstan-session", "")), context.peer()
        )
        stream = _Stream(peer, context, time.monotonic())
        try:
            record = self._record(stream)
        except CapstanError as error:
            context.abort(status.FAILED_PRECONDITION, str(error))
        if not context.add_callback(lambda: self._lose(record, stream)):
            self._lose(record, stream)
            return
        for message in messages:
            stream.is_waiting = False
            try:
                answer = seal(self._answer(record, peer, message))
            except TimeoutExpired as error:
                context.abort(status.UNAVAILABLE, str(error))
            except CapstanError as error:
                _log.warning("%s", error)
                context.abort(status.INVALID_ARGUMENT, str(error))
            self.ledger.count(f"server->{peer.name}", "session", len(answer))
            yield answer
            stream.last_asked_s, stream.is_waiting = time.monotonic(), True

    def _record(self, stream: _Stream) -> _Record:
        session = stream.peer.session
        if not (session and stream.peer.name):
            raise UsageError("A session has a name and an identity: connect with capstan's Session.")
        with self._lock:
            record = self._records.setdefault(session, _Record())
            self._records.move_to_end(session)
            record.stream = stream
            if len(self._records) > self._limits.max_sessions:
                unconnected = next((name for name, each in self._records.items() if not each.stream), None)
                if unconnected is None:
                    del self._records[session]
                    raise DeviceError(
                        f"{self._limits.max_sessions} sessions are connected: no more are let in."
                    )
                del self._records[unconnected]
            return record

    def _lose(self, record: _Record, stream: _Stream) -> None:
        with self._lock:
            is_last = record.stream is stream
            if is_last:
                record.stream = None
        if is_last and self._on_lost is not None and not self._closing.is_set():
            self._on_lost(stream.peer)

    def _answer(self, record: _Record, peer: Peer, message: bytes) -> Envelope:
        self.ledger.count(f"{peer.name}->server", "session", len(message))
        asked = unseal(message, sender=str(peer))
        if asked.kind is not Kind.REQUEST:
            raise InputError(f"{peer} sent an {asked.kind.name.lower()} where requests come from.")
        return record.answers.answer(
            asked.number, lambda: self._apply(peer, asked.number, asked.payload), self._answer_s
        )

    def _apply(self, peer: Peer, number: int, request: bytes) -> Envelope:
        try:
            answer = self._handle(peer, request)
            if len(answer) > self._limits.max_message_bytes:
                raise InputError(f"The answer has {len(answer)} bytes, more than the limit of a message.")
            return Envelope(Kind.ANSWER, number, answer)
        except CapstanError as error:
            _log.warning("%s is refused: %s", peer, error)
            return Envelope(Kind.REFUSAL, number, str(error).encode())
        except Exception as error:  # of one request: the others go on
            _log.exception("The answer to %s failed", peer)
            said = f"The server failed at request {number}: {type(error).__name__}. Its log says more."
            return Envelope(Kind.REFUSAL, number, said.encode())

    def _close_idle_streams(self) -> None:
        while not self._closing.wait(_LOOK_S):
            before_s = time.monotonic() - self._limits.idle_s
            with self._lock:
                streams = [each.stream for each in self._records.values() if each.stream]
            for stream in streams:
                if stream.is_waiting and stream.last_asked_s < before_s:
                    _log.warning("%s asked nothing for %s s: closed.", stream.peer, self._limits.idle_s)
                    with suppress(Exception):  # it may have gone meanwhile
                        stream.context.cancel()
