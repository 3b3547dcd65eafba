"""The server's process: wait for the devices, train, and tell them when it is over."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from capstan.errors import CapstanError
from capstan.federation.config import JobConfig
from capstan.federation.job import EpochCounts
from capstan.federation.joining import job_record
from capstan.federation.remote_fleet import RemoteFleet
from capstan.federation.runs import FinishedRun, PreparedRun, load_run, prepare_served_run, train_run
from capstan.transport.sessions import Limits, Security, SessionServer


class ServedRun(NamedTuple):
    """A run over sessions: its plan, what came of it, and what crossed the sessions, envelopes and all."""

    prepared: PreparedRun
    finished: FinishedRun
    session_bytes: int
    late_results: int


def serve_run(
    config: JobConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    security: Security | None = None,
    on_port: Callable[[int], None] | None = None,
    on_plan: Callable[[PreparedRun], None] | None = None,
    on_epoch: Callable[[EpochCounts, float], None] | None = None,
    starts_devices: bool = False,
) -> ServedRun:
    """Train with devices that join at `port`, or with processes of this machine, if it `starts_devices`.

    Raises:
        TimeoutExpired: too few devices are there for `sessions.rejoin_s`.
    """
    loaded = load_run(config)
    shape, num_classes = tuple(loaded.train.inputs.shape[1:]), loaded.network.num_classes
    fleet = RemoteFleet(
        config.devices.count,
        job_record(config, shape, num_classes),
        deadline_s=config.sessions.deadline_s,
        rejoin_s=config.sessions.rejoin_s,
    )
    # A device that rejoins is there twice for a while.
    limits = Limits(max_sessions=2 * config.devices.count + 8)
    with (
        SessionServer(
            fleet.handle, host=host, port=port, security=security, limits=limits, on_lost=fleet.on_lost
        ) as server,
        _devices(config.devices.count, server.port) if starts_devices else nullcontext(),
    ):
        if on_port is not None:
            on_port(server.port)
        try:
            fleet.wait_for_all(config.devices.batches)
            prepared = prepare_served_run(config, loaded, fleet)
            if on_plan is not None:
                on_plan(prepared)
            finished = train_run(prepared, on_epoch=on_epoch)
        except CapstanError as error:
            fleet.end(str(error))
            raise
        fleet.end()
        session_bytes = sum(server.ledger.traffic.size_bytes.values())
    return ServedRun(prepared, finished, session_bytes, fleet.late_results)


@contextmanager
def _devices(count: int, port: int) -> Iterator[None]:
    """Device processes on this machine, gone afterwards."""
    command = [sys.executable, "-m", "capstan", "federate", "join", f"127.0.0.1:{port}", "--device"]
    processes = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.DEVNULL, cwd=Path.cwd())
        for number in range(count)
    ]
    try:
        yield
        for process in processes:
            process.wait(30)
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
