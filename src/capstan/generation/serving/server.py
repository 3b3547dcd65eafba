"""Running the server: its socket, its signals, its end."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread

import uvicorn

from capstan.errors import CapstanError, DeviceError, UsageError
from capstan.generation.engine import Engine
from capstan.generation.serving.app import Served, build_app
from capstan.generation.serving.connections import bounded_protocol
from capstan.generation.serving.crew import Counts, Crew
from capstan.generation.serving.limits import Limits

logger = logging.getLogger(__name__)

_BACKLOG = 2048


class ServerFailed(CapstanError):
    """The engine failed so that the server had to end."""


class _Server(uvicorn.Server):
    """uvicorn's server, which ends in an orderly way for every signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if current_thread() is main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        UsageError: there is no such address.
        DeviceError: the port is taken, or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"{host!r} is no address of this machine: {error}.") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise DeviceError(
            f"{host}:{port} cannot be listened on: {error.strerror}. Name another --port; 0 takes a free one."
        ) from error
    return listening


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(str(each[4][0]).startswith("127.") or each[4][0] == "::1" for each in found)


def run_server(
    engine: Engine,
    listening: socket.socket,
    *,
    name: str,
    limits: Limits,
    token: str | None = None,
    folder: Path | None = None,
    allow_origins: Sequence[str] = (),
    on_ready: Callable[[Callable[[], None]], None] | None = None,
) -> Counts:
    """Serve until SIGINT or SIGTERM; returns what was done. `on_ready` is called when the server answers,
    with a function that stops it too.

    Requests that run then have `limits.shutdown_s` to end; batches go on when a server is next started over
    `folder`.

    Raises:
        ServerFailed: the engine failed, and failed again.
    """
    crew = Crew(engine, queue=limits.queue)
    address = str(listening.getsockname()[0])
    hosts = frozenset({address, "localhost"}) if token is None and is_loopback(address) else None
    app = build_app(
        Served(crew, name=name, limits=limits),
        token=token,
        hosts=hosts,
        folder=folder,
        allow_origins=allow_origins,
    )
    server = _Server(
        uvicorn.Config(
            app,
            http=bounded_protocol(limits),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=limits.connections,
            backlog=_BACKLOG,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, int(limits.shutdown_s)),
        )
    )

    def stop() -> None:
        server.should_exit = True

    crew.on_failure = stop

    async def serve() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started and on_ready is not None:
            on_ready(stop)
        await serving

    asyncio.run(serve())
    if crew.has_failed:
        raise ServerFailed(f"{crew.failure} Nothing could be answered any more, so the server has ended.")
    return crew.counts
