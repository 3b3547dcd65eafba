"""What tests of several rooms share: processes, worlds of ranks, and what each room's tests cost."""

import os

# Before numpy or torch is imported: tensors are so small here that a second thread only costs, and where two
# workers share two cores a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

import world
from covering import covering
from world import Forked, WarmParent

try:
    from hypothesis import settings
except ImportError:  # GPU tests also run where it is not installed
    pass
else:
    # A deadline for an example would be a timed assertion.
    settings.register_profile("default", deadline=None)
    # A merge must not depend on luck: for it the same examples are drawn every time. People draw new ones.
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI", "").lower() in ("1", "true") else "default")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a grid of parameters that says so, what covering.py leaves out is slow."""
    grids: dict[Any, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("covering") and item.get_closest_marker("slow") is None:
            grids[item.path, item.originalname].append(item)
    for grid in grids.values():
        (strength,) = grid[0].get_closest_marker("covering").args
        chosen = covering([_values_of(each) for each in grid], strength)
        for at, item in enumerate(grid):
            if at not in chosen:
                item.add_marker(pytest.mark.slow)


def _values_of(item: Any) -> dict[str, str]:
    return {name: repr(value) for name, value in item.callspec.params.items()}


def pytest_collection_finish() -> None:
    """What is imported stays: a test that collects garbage need not look through all of torch for it."""
    gc.collect()
    gc.freeze()


# --- processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def warm_parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmParent]:
    """The parent of every process that tests start; see world.py."""
    parent = WarmParent(tmp_path_factory.mktemp("processes"))
    _cost.warm_parents.add(parent.pid)
    yield parent
    parent.close()
    _cost.warm_parents.remove(parent.pid)


@pytest.fixture(scope="module")
def fork(warm_parent: WarmParent) -> Iterator[Callable[..., Forked]]:
    """`fork(file, function, *arguments, environment=…)`: a process that calls the function and ends as a
    program does. Killed when the file's tests are over."""
    started: list[Forked] = []

    def fork(
        file: str | Path, function: str, *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> Forked:
        started.append(warm_parent.fork(file, function, arguments, environment, ends=True))
        return started[-1]

    yield fork
    for process in started:
        process.kill()
        process.wait(60)


@pytest.fixture(scope="module")
def torchrun() -> Iterator[Callable[[int], list[dict[str, str]]]]:
    """`torchrun(size)`: for each rank the variables that torchrun sets.

    As with torchrun itself the store in which ranks meet is not theirs but their starter's. So its port was
    never closed since it was found to be free, and a rank that dies does not take it along.
    """
    import torch.distributed as dist

    stores = []

    def torchrun(size: int) -> list[dict[str, str]]:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stores.append(store)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "WORLD_SIZE": str(size),
        }
        return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]

    yield torchrun
    stores.clear()


@pytest.fixture(scope="session")
def in_world(warm_parent: WarmParent) -> Callable[..., list[Any]]:
    """`in_world(file, function, size, arguments)`: what the function of (rank, size, arguments) returned on
    every rank, torch's default group being gloo; None for those that failed, of which there are `failing`.
    """

    def in_world(
        file: str, function: str, size: int, arguments: Any = None, *, failing: int = 0
    ) -> list[Any]:
        import torch  # here, because whoever only divides tests among others needs no torch

        folder = warm_parent.new_folder()
        ranks = []
        warm_parent.ask(prepare=file)
        for rank in range(size):
            variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            ranks.append(
                warm_parent.fork(
                    world.__file__,
                    "be_rank",
                    [file, function, rank, size, str(folder), arguments],
                    variables | {"GLOO_SOCKET_IFNAME": "lo"},
                    folder,
                    f"rank{rank}",
                )
            )
        saved = [folder / f"{rank}.pt" for rank in range(size)]
        done = [folder / f"{rank}.done" for rank in range(size)]
        until_s = time.monotonic() + 240
        try:
            while any(
                rank.poll() is None and not path.exists() for rank, path in zip(ranks, done, strict=True)
            ):
                assert time.monotonic() < until_s, "".join(rank.err for rank in ranks)
                time.sleep(0.002)
            (folder / "end").touch()
            for rank in ranks:
                if rank.poll() is None and psutil.Process(rank.pid).status() == psutil.STATUS_STOPPED:
                    rank.kill()
            codes = [rank.wait(60) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait(60)
        assert sum(code != 0 for code in codes) == failing, "".join(rank.err for rank in ranks)
        return [torch.load(path, weights_only=True) if path.exists() else None for path in saved]

    return in_world


# --- what tests cost -------------------------------------------------------------------------------------


class Cost:
    """Processor seconds, of this process and of those that it waited for or that the warm parent forked."""

    def __init__(self) -> None:
        self.warm_parents: set[int] = set()
        self.of_room: dict[str, float] = defaultdict(float)
        self._noted_s = self._now_s()

    def _now_s(self) -> float:
        times = os.times()
        all_s = times.user + times.system + times.children_user + times.children_system
        return all_s + sum(sum(psutil.Process(pid).cpu_times()[:4]) for pid in self.warm_parents)

    def since_noted_s(self) -> float:
        before_s, self._noted_s = self._noted_s, self._now_s()
        return self._noted_s - before_s


_cost = Cost()


def pytest_runtest_setup() -> None:
    if not _cost.of_room:
        _cost.since_noted_s()  # what was imported to collect the tests is no room's


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    report.processor_s = _cost.since_noted_s()
    return report


def pytest_runtest_logreport(report: Any) -> None:
    room, _, is_folder = report.nodeid.partition("::")[0].removeprefix("tests/").partition("/")
    _cost.of_room[room if is_folder else "architecture"] += report.processor_s


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _cost.of_room:
        each = sorted(_cost.of_room.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{room} {seconds:.0f}" for room, seconds in each)
        terminalreporter.write_line(f"processor seconds: {shown}; together {sum(_cost.of_room.values()):.0f}")
