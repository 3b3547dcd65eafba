"""Lanes: in order, after what they need, and no error is lost."""

import threading
from concurrent.futures import CancelledError
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import CapstanError, TimeoutExpired
from capstan.plans import Traffic
from capstan.transport import Lane, Ledger, Ticket, lanes

CPU = torch.device("cpu")
BOUND_S = 30.0  # how long a test waits for what must come; nothing is measured with it


def _lane(name: str = "up", ledger: Ledger | None = None) -> Lane:
    return Lane(name, device=CPU, ledger=ledger or Ledger())


@pytest.fixture
def gate():
    """An event on which tasks wait; opened at the end whatever happens, so that lanes can close."""
    gate = threading.Event()
    yield gate
    gate.set()


def _fail() -> None:
    raise ValueError("torn cable")


def test_tasks_run_in_the_order_in_which_they_were_submitted():
    done: list[int] = []
    with _lane() as lane:
        for number in range(500):
            lane.submit(lambda number=number: done.append(number))
        lane.drain()
    assert done == list(range(500))


@st.composite
def graphs(draw) -> list[tuple[int, list[int]]]:
    """For each task the number of its lane, and up to two earlier tasks that it comes after."""
    choices = draw(st.lists(st.integers(0, 2), min_size=2, max_size=60))
    return [
        (lane, draw(st.lists(st.integers(0, number - 1), max_size=2)) if number else [])
        for number, lane in enumerate(choices)
    ]


@settings(max_examples=25, deadline=None)
@given(graphs())
def test_after_is_respected_across_lanes(graph):
    done: list[int] = []
    start = threading.Event()
    with ExitStack() as stack:
        workers = [stack.enter_context(_lane(f"lane {number}")) for number in range(3)]
        for worker in workers:
            worker.submit(lambda: start.wait(BOUND_S))
        tickets: list[Ticket] = []
        for number, (choice, others) in enumerate(graph):
            after = [tickets[other] for other in others]
            tickets.append(workers[choice].submit(lambda number=number: done.append(number), after=after))
        start.set()
        for worker in workers:
            worker.drain()
    assert sorted(done) == list(range(len(graph)))
    position = {number: place for place, number in enumerate(done)}
    assert all(
        position[other] < position[number] for number, (_, others) in enumerate(graph) for other in others
    )


def test_a_task_does_not_start_before_what_it_comes_after(gate):
    """The first lane is held by a gate that only the second lane opens, when it begins to wait."""
    done: list[str] = []

    class _Opening(Ticket):
        def wait(self) -> None:
            gate.set()
            super().wait()

    with _lane("first") as first, _lane("second") as second:
        held = first.submit(lambda: (gate.wait(BOUND_S), done.append("first")))
        second.submit(lambda: done.append("second"), after=[_Opening("first", held._future)]).wait()
        gate.set()
    assert done == ["first", "second"]


def test_lanes_run_side_by_side():
    """Each of two tasks waits for the other; one worker for both would never end."""
    meet = threading.Barrier(2)
    with _lane("up") as up, _lane("down") as down:
        tickets = [lane.submit(lambda: meet.wait(BOUND_S)) for lane in (up, down)]
        for ticket in tickets:
            ticket.wait()


@pytest.mark.parametrize("wait", ["wait", "wait_on_host"])
def test_an_error_surfaces_where_its_ticket_is_waited_for(wait):
    with _lane() as lane:
        ticket = lane.submit(_fail)
        with pytest.raises(ValueError, match="torn cable"):
            getattr(ticket, wait)()


def test_an_error_surfaces_at_the_next_submit():
    done: list[str] = []
    with _lane() as lane:
        ticket = lane.submit(_fail)
        with pytest.raises(ValueError, match="torn cable"):
            ticket.wait()
        with pytest.raises(ValueError, match="torn cable"):
            lane.submit(lambda: done.append("too late"))
    assert done == []


def test_an_error_surfaces_at_drain_also_if_a_later_task_was_fine(gate):
    with _lane() as lane:
        lane.submit(lambda: gate.wait(BOUND_S))
        lane.submit(_fail)
        fine = lane.submit(lambda: None)
        gate.set()
        with pytest.raises(ValueError, match="torn cable"):
            lane.drain()
        fine.wait()


def test_the_first_of_several_errors_is_the_one_that_drain_raises_and_it_raises_it_once(gate):
    done: list[str] = []
    with _lane() as lane:
        lane.submit(lambda: gate.wait(BOUND_S))
        lane.submit(_fail)
        lane.submit(lambda: 1 / 0)
        gate.set()
        with pytest.raises(ValueError, match="torn cable"):
            lane.drain()
        lane.drain()
        lane.submit(lambda: done.append("after"))
        lane.drain()
    assert done == ["after"]


def test_an_error_is_passed_on_to_what_comes_after_it_on_another_lane():
    done: list[str] = []
    with _lane("first") as first, _lane("second") as second:
        failing = first.submit(_fail)
        after = second.submit(lambda: done.append("second"), after=[failing])
        with pytest.raises(ValueError, match="torn cable"):
            after.wait()
    assert done == []


def test_a_lane_without_tasks_drains_at_once():
    with _lane() as lane:
        lane.drain()


def test_close_drops_the_tasks_that_have_not_begun(monkeypatch, gate):
    monkeypatch.setattr(lanes, "_PATIENCE_S", BOUND_S)
    done: list[int] = []
    lane, began = _lane(), threading.Event()
    lane.submit(lambda: (began.set(), gate.wait(BOUND_S), done.append(-1)))
    queued = [lane.submit(lambda number=number: done.append(number)) for number in range(100)]
    assert began.wait(BOUND_S)
    closing = threading.Thread(target=lane.close)
    closing.start()
    with pytest.raises((CancelledError, CapstanError)) as caught:
        queued[-1].wait()  # the lane is closing: nobody will run this
    assert not isinstance(caught.value, TimeoutExpired)
    gate.set()
    closing.join(BOUND_S)
    assert not closing.is_alive()
    assert done == [-1]


def test_close_ends_the_thread_and_may_be_repeated():
    lane = _lane("a lane of this test")
    lane.submit(lambda: None).wait()
    assert _threads_of("a lane of this test") == 1
    lane.close()
    lane.close()
    assert _threads_of("a lane of this test") == 0


def _threads_of(lane: str) -> int:
    return sum(thread.name.startswith(f"capstan {lane}") for thread in threading.enumerate())


@pytest.mark.parametrize("wait", ["wait", "wait_on_host", "drain"])
def test_a_bounded_wait_names_the_lane_that_did_not_answer(monkeypatch, gate, wait):
    with _lane("disk->host") as lane:
        ticket = lane.submit(lambda: gate.wait(BOUND_S))
        monkeypatch.setattr(lanes, "_PATIENCE_S", 0.01)
        with pytest.raises(TimeoutExpired, match=r"lane 'disk->host' did not finish"):
            (lane.drain if wait == "drain" else getattr(ticket, wait))()
        gate.set()


def test_a_timeout_of_the_task_itself_is_not_taken_for_the_lanes():
    """The operating system's ETIMEDOUT is the same class that a bounded wait raises."""

    def fail() -> None:
        raise TimeoutError(110, "Connection timed out")

    with _lane() as lane:
        ticket = lane.submit(fail)
        with pytest.raises(TimeoutError, match="Connection timed out"):
            ticket.wait()


sizes = st.lists(st.integers(0, 5), max_size=3)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(sizes, dtypes), min_size=1, max_size=4))
def test_copy_moves_the_values_and_counts_their_bytes_exactly(specs):
    ledger, expected = Ledger(), 0
    with _lane(ledger=ledger) as lane:
        for shape, dtype in specs:
            source, target = torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
            lane.submit(
                lambda source=source, target=target: lane.copy(
                    target, source, link="host->device", content="cache"
                )
            ).wait()
            assert torch.equal(target, source)
            expected += source.nbytes
    assert ledger.traffic == Traffic({("host->device", "cache"): expected})
    assert set(ledger.busy_s) == {"host->device"}


def test_a_strided_copy_counts_the_elements_and_not_what_lies_between():
    ledger = Ledger()
    with _lane(ledger=ledger) as lane:
        source, target = torch.arange(100.0).view(10, 10), torch.zeros(10)
        lane.submit(lambda: lane.copy(target, source[:, 3], link="a->b", content="weights")).wait()
    assert torch.equal(target, source[:, 3])
    assert ledger.traffic.on("a->b") == 40


def test_a_copy_that_fails_counts_no_bytes():
    ledger = Ledger()
    with _lane(ledger=ledger) as lane:
        ticket = lane.submit(
            lambda: lane.copy(torch.zeros(3), torch.zeros(4), link="a->b", content="weights")
        )
        with pytest.raises(RuntimeError):
            ticket.wait()
    assert ledger.traffic == Traffic()


def test_a_booked_block_counts_its_bytes_only_when_it_succeeds():
    ledger = Ledger()

    def read_and_fail() -> None:
        with lane.booking("disk->host", "weights", 1000):
            pass
        with lane.booking("disk->host", "weights", 7):
            _fail()

    with _lane(ledger=ledger) as lane, pytest.raises(ValueError, match="torn cable"):
        lane.submit(read_and_fail).wait()
    assert ledger.traffic == Traffic({("disk->host", "weights"): 1000})


def test_a_copy_into_a_parameter_records_no_gradient():
    parameter = torch.nn.Parameter(torch.zeros(3))
    with _lane() as lane:
        source = torch.ones(3, requires_grad=True)
        lane.submit(lambda: lane.copy(parameter, source, link="a->b", content="weights")).wait()
    assert parameter.grad_fn is None
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_without_cuda_there_is_nothing_to_fence_or_synchronize():
    seen: list[object] = []
    with _lane() as lane:
        lane.submit(lambda: (seen.append(lane.fence()), lane.synchronize())).wait()
    assert seen == [None]
