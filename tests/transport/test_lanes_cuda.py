"""Lanes on a GPU: order between streams is kept by events, and memory in flight is not used again."""

from contextlib import ExitStack

import pytest
import torch

from capstan.transport import Lane, Ledger, Stopwatch

pytestmark = pytest.mark.gpu

NUM_ELEMENTS = 1 << 20
LONG_CYCLES = 200_000_000  # about 0.1 s of a stream: anything not ordered after it comes before it


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def lanes(ledger):
    with ExitStack() as stack:
        device = torch.device("cuda")
        yield [stack.enter_context(Lane(name, device=device, ledger=ledger)) for name in ("up", "down")]


def _pinned(value: float = 0.0) -> torch.Tensor:
    return torch.full((NUM_ELEMENTS,), value, pin_memory=True)


def _on_device(value: float = 0.0) -> torch.Tensor:
    return torch.full((NUM_ELEMENTS,), value, device="cuda")


def _copy(lane: Lane, target: torch.Tensor, source: torch.Tensor) -> None:
    lane.copy(target, source, link="a->b", content="activations")


def test_a_copy_after_compute_sees_the_computed_values(lanes):
    values, host = _on_device(), _pinned()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    values.fill_(7)
    lanes[0].submit(lambda: _copy(lanes[0], host, values), uses=[values]).wait_on_host()
    assert (host == 7).all()


def test_compute_after_wait_sees_the_copied_values(lanes):
    values, host = _on_device(), _pinned(3.0)
    _ = values * 2  # loads the kernel, which may stop the device the first time
    torch.cuda.synchronize()
    ticket = lanes[0].submit(lambda: (torch.cuda._sleep(LONG_CYCLES), _copy(lanes[0], values, host)))
    ticket.wait()
    assert ((values * 2).cpu() == 6).all()


def test_compute_before_wait_goes_on_beside_the_copy(lanes):
    """Proof that the waiting above matters: without it the old values are seen."""
    values, host, seen = _on_device(1.0), _pinned(3.0), _on_device()
    torch.cuda.synchronize()
    ticket = lanes[0].submit(lambda: (torch.cuda._sleep(LONG_CYCLES), _copy(lanes[0], values, host)))
    seen.copy_(values)
    ticket.wait_on_host()
    assert (seen == 1).all()
    assert (values == 3).all()


def test_after_orders_the_streams_of_two_lanes(lanes):
    up, down = lanes
    values, source, target = _on_device(), _pinned(5.0), _pinned()
    torch.cuda.synchronize()
    copied = up.submit(lambda: (torch.cuda._sleep(LONG_CYCLES), _copy(up, values, source)))
    down.submit(lambda: _copy(down, target, values), after=[copied]).wait_on_host()
    assert (target == 5).all()


def _submit_a_slow_copy_and_drop_its_source(lane: Lane, host: torch.Tensor, *, is_named: bool) -> int:
    """The address that the source had. The copy waits on the lane's stream when this returns."""
    values = _on_device(9.0)
    torch.cuda.synchronize()
    address = values.data_ptr()

    def task(values: torch.Tensor = values) -> None:
        torch.cuda._sleep(LONG_CYCLES)
        _copy(lane, host, values)

    ticket = lane.submit(task, uses=[values] if is_named else [])
    del task, values
    ticket._issued()
    lane.submit(lambda: None)._issued()  # the worker has let go of the first task
    return address


def test_memory_that_a_copy_uses_is_not_handed_out_before_it_has_run(lanes):
    host = _pinned()
    address = _submit_a_slow_copy_and_drop_its_source(lanes[0], host, is_named=True)
    other = _on_device(-1.0)
    assert other.data_ptr() != address
    lanes[0].drain()
    assert (host == 9).all()


def test_memory_that_is_not_named_would_be_handed_out(lanes):
    """Proof that `uses` matters: without it the allocator gives the source's memory to the next tensor."""
    address = _submit_a_slow_copy_and_drop_its_source(lanes[0], _pinned(), is_named=False)
    other = torch.empty(NUM_ELEMENTS, device="cuda")
    assert other.data_ptr() == address
    lanes[0].drain()


def test_drain_waits_until_the_last_copy_has_taken_effect(lanes):
    values, host = _on_device(4.0), _pinned()
    torch.cuda.synchronize()
    lanes[0].submit(lambda: (torch.cuda._sleep(LONG_CYCLES), _copy(lanes[0], host, values)), uses=[values])
    lanes[0].drain()
    assert (host == 4).all()


def test_synchronize_and_fence_wait_for_the_copies_started_so_far(lanes):
    values, host = _on_device(4.0), _pinned()
    torch.cuda.synchronize()
    seen: list[bool] = []

    def task() -> None:
        torch.cuda._sleep(LONG_CYCLES)
        _copy(lanes[0], host, values)
        mark = lanes[0].fence()
        seen.append(mark.query())
        lanes[0].synchronize()
        seen.append(mark.query())
        seen.append(bool((host == 4).all()))

    lanes[0].submit(task, uses=[values]).wait()
    assert seen == [False, True, True]


def test_copies_are_counted_exactly_and_timed_when_the_stopwatch_settles(lanes, ledger):
    values, host = _on_device(), _pinned()
    for _ in range(3):
        lanes[0].submit(lambda: _copy(lanes[0], values, host))
    lanes[0].drain()
    assert ledger.traffic.to_dict() == {"a->b": {"activations": 3 * 4 * NUM_ELEMENTS}}
    assert ledger.busy_s == {}
    lanes[0].stopwatch.settle()
    assert set(ledger.busy_s) == {"a->b"}
    assert ledger.busy_s["a->b"] > 0
    once = dict(ledger.busy_s)
    lanes[0].stopwatch.settle()
    assert ledger.busy_s == once


def test_a_stopwatch_measures_the_device_and_not_the_thread_that_starts_it(ledger):
    watch = Stopwatch(ledger, torch.device("cuda"))
    torch.cuda.synchronize()
    with watch.time("device compute"):
        torch.cuda._sleep(LONG_CYCLES)
    assert not torch.cuda.current_stream().query()  # measuring has not waited
    watch.settle()
    assert ledger.busy_s["device compute"] > 0.02  # at 10 GHz these cycles would take as long


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="about several GPUs")
def test_order_is_kept_on_the_lanes_device_whichever_device_is_current(ledger):
    device = torch.device("cuda", 1)
    host = _pinned(3.0)
    with torch.cuda.device(device):
        values, seen = _on_device(7.0), _pinned()
        _ = values * 2  # loads the kernel
        torch.cuda.synchronize()
    assert torch.cuda.current_device() == 0
    with Lane("up", device=device, ledger=ledger) as lane:
        with torch.cuda.device(device):
            torch.cuda._sleep(LONG_CYCLES)
            values.add_(1)
        lane.submit(lambda: _copy(lane, seen, values), uses=[values]).wait_on_host()
        assert (seen == 8).all()
        lane.submit(lambda: (torch.cuda._sleep(LONG_CYCLES), _copy(lane, values, host))).wait()
        with torch.cuda.device(device):
            doubled = values * 2
        assert (doubled.cpu() == 6).all()
        lane.stopwatch.settle()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="about several GPUs")
def test_after_orders_lanes_of_different_devices(ledger):
    values, source, target = _on_device(), _pinned(5.0), _pinned()
    torch.cuda.synchronize()
    with (
        Lane("up", device=torch.device("cuda", 0), ledger=ledger) as up,
        Lane("down", device=torch.device("cuda", 1), ledger=ledger) as down,
    ):
        copied = up.submit(lambda: (torch.cuda._sleep(LONG_CYCLES), _copy(up, values, source)))
        on_other = torch.empty(NUM_ELEMENTS, device="cuda:1")
        down.submit(lambda: _copy(down, on_other, values), after=[copied])
        down.submit(lambda: _copy(down, target, on_other)).wait_on_host()
    assert (target == 5).all()
