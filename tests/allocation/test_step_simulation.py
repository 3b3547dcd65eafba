import xml.etree.ElementTree as ElementTree
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.allocation import Layout, StepSimulation, StepTask, gantt_svg, simulate_step
from capstan.allocation.virtual_time import Work, simulate
from capstan.errors import UsageError
from capstan.hardware import Cluster

# Sixteenths of a second add up exactly in floats, so closed forms are compared with ==.
ticks = st.integers(0, 64).map(lambda number: number / 16)
busy = st.integers(1, 64).map(lambda number: number / 16)


def network(size: int, *, latency_s: float = 0.0, bandwidth: float = 1.0) -> Cluster:
    return Cluster(
        names=tuple(f"d{number}" for number in range(size)),
        latency_s=((latency_s,) * size,) * size,
        bandwidth_bytes_per_s=((bandwidth,) * size,) * size,
    )


def chain(size: int) -> Layout:
    return Layout(groups=tuple((device,) for device in range(size)))


def step(
    cluster: Cluster, schedule: str, many: int, forward_s: list[float], backward_s: list[float], size: float
) -> StepSimulation:
    task = StepTask(
        micro_batches=many,
        forward_s=forward_s,
        backward_s=backward_s,
        activation_bytes=size,
        schedule=schedule,
    )
    return simulate_step(cluster, chain(len(cluster.names)), task)


@given(st.integers(1, 5), st.integers(1, 8), busy, busy, st.sampled_from(["gpipe", "1f1b"]))
def test_a_chain_without_a_network_takes_m_plus_s_minus_1(
    stages: int, many: int, forward_s: float, backward_s: float, schedule: str
) -> None:
    found = step(network(stages), schedule, many, [forward_s] * stages, [backward_s] * stages, 0.0)
    assert found.seconds == (many + stages - 1) * (forward_s + backward_s)


@given(st.data(), st.integers(1, 5), st.integers(1, 6), ticks, ticks)
def test_gpipe_on_any_chain_is_the_sum_of_a_micro_batch_and_the_slowest_for_the_others(
    data: st.DataObject, stages: int, many: int, latency_s: float, size: float
) -> None:
    """A flow line of equal jobs: unequal devices and a slow link among them, overlapped or not."""
    forward_s, backward_s = ([data.draw(busy) for _ in range(stages)] for _ in range(2))
    slow = [data.draw(st.sampled_from([1.0, 0.5, 0.25])) for _ in range(stages - 1)]
    bandwidth = [[1.0] * stages for _ in range(stages)]
    for number, rate in enumerate(slow):
        bandwidth[number][number + 1] = bandwidth[number + 1][number] = rate
    cluster = Cluster(
        names=tuple(f"d{number}" for number in range(stages)),
        latency_s=((latency_s,) * stages,) * stages,
        bandwidth_bytes_per_s=tuple(map(tuple, bandwidth)),
    )
    messages = [size / rate for rate in slow]
    on_the_way = sum(messages) + (stages - 1) * latency_s
    forward = sum(forward_s) + on_the_way + (many - 1) * max(*forward_s, *messages, 0.0)
    found = step(cluster, "gpipe", many, forward_s, backward_s, size)
    # Its last forward on the last stage is the last of all, and then the same line runs the other way.
    backward = sum(backward_s) + on_the_way + (many - 1) * max(*backward_s, *messages, 0.0)
    assert found.seconds == forward + backward


@given(st.integers(2, 5), st.integers(1, 8), busy, busy)
def test_messages_as_long_as_compute_are_hidden_but_for_the_first(
    stages: int, many: int, compute_s: float, latency_s: float
) -> None:
    found = step(
        network(stages, latency_s=latency_s),
        "gpipe",
        many,
        [compute_s] * stages,
        [compute_s] * stages,
        compute_s,
    )
    one_way = (many + stages - 1) * compute_s + (stages - 1) * (compute_s + latency_s)
    assert found.seconds == 2 * one_way


def test_links_are_full_duplex() -> None:
    found = step(network(2), "1f1b", 8, [0.25] * 2, [0.25] * 2, 1.0)
    there, back = (
        [each for each in found.intervals if each.resource == link] for link in ("d0->d1", "d1->d0")
    )
    assert any(one.start_s < other.end_s and other.start_s < one.end_s for one in there for other in back)


@given(st.integers(1, 6), st.integers(1, 10))
def test_1f1b_holds_no_more_micro_batches_than_stages_follow(stages: int, many: int) -> None:
    runs = {
        schedule: step(network(stages), schedule, many, [1.0] * stages, [1.0] * stages, 0.0).in_flight
        for schedule in ("gpipe", "1f1b")
    }
    assert runs["gpipe"] == (many,) * stages
    assert runs["1f1b"] == tuple(min(many, stages - stage) for stage in range(stages))


@given(st.sampled_from([1, 2, 4, 8]), ticks, busy)
def test_replicas_exchange_gradients_in_two_rounds(replicas: int, latency_s: float, compute_s: float) -> None:
    task = StepTask(
        micro_batches=2,
        forward_s=[compute_s] * replicas,
        backward_s=[compute_s] * replicas,
        activation_bytes=0.0,
        gradient_bytes=1.0,
    )
    layout = Layout(groups=(tuple(range(replicas)),))
    found = simulate_step(network(replicas, latency_s=latency_s), layout, task)
    share = Fraction(1, replicas)
    exchange = 2 * ((replicas - 1) * share + Fraction(latency_s)) if replicas > 1 else 0
    assert Fraction(found.seconds) == 4 * Fraction(compute_s) + exchange


@given(st.data())
def test_no_resource_does_two_works_at_once_and_none_starts_before_what_it_waits_for(
    data: st.DataObject,
) -> None:
    works = [
        Work(
            name=str(number),
            resource=data.draw(st.sampled_from("abc")),
            seconds=data.draw(ticks),
            delay_s=data.draw(ticks),
            after=tuple(map(str, data.draw(st.sets(st.integers(0, number - 1), max_size=3))))
            if number
            else (),
            order=data.draw(st.integers(0, 3)),
        )
        for number in range(data.draw(st.integers(1, 12)))
    ]
    runs = {each.name: each for each in simulate(works)}
    assert len(runs) == len(works)
    for work in works:
        for before in work.after:
            assert runs[work.name].start_s >= runs[before].end_s + works[int(before)].delay_s
        earlier = [
            each for each in runs.values()
            if each.resource == work.resource and each.start_s < runs[work.name].start_s
        ]  # fmt: skip
        assert all(each.end_s <= runs[work.name].start_s for each in earlier)


def test_works_that_cannot_be_simulated_are_refused() -> None:
    one = Work(name="one", resource="a", seconds=1.0, after=("two",))
    with pytest.raises(UsageError, match="'one' waits for 'two', which is not among"):
        simulate([one])
    with pytest.raises(UsageError, match="waits for itself"):
        simulate([one, Work(name="two", resource="a", seconds=1.0, after=("one",))])
    with pytest.raises(UsageError, match="name 'x'"):
        simulate([Work(name="x", resource="a", seconds=1.0)] * 2)
    with pytest.raises(UsageError, match="takes nan s"):
        simulate([Work(name="x", resource="a", seconds=float("nan"))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "2f2b"}, "no schedule '2f2b'"),
        ({"micro_batches": 0}, "at least 1 micro-batch"),
        ({"activation_bytes": -1.0}, "0 bytes or more"),
        ({"forward_s": [1.0]}, "forward_s has 1 entries for 2 devices"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "micro_batches": 1, "forward_s": [1.0] * 2, "backward_s": [1.0] * 2, "activation_bytes": 1.0,
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        simulate_step(network(2), chain(2), StepTask(**good | change))  # type: ignore[arg-type]


def test_the_chart_has_a_bar_for_every_work_as_wide_as_its_time() -> None:
    task = StepTask(
        micro_batches=3, forward_s=[1.0] * 4, backward_s=[2.0] * 4, activation_bytes=0.5, gradient_bytes=1.0
    )
    found = simulate_step(network(4), Layout(groups=((0, 1), (2, 3))), task)
    chart = ElementTree.fromstring(gantt_svg(found))
    space = "{http://www.w3.org/2000/svg}"
    bars = [each for each in chart.iter(f"{space}rect") if each.find(f"{space}title") is not None]
    assert len(bars) == len(found.intervals)
    for bar, each in zip(bars, found.intervals, strict=True):
        # 900 units for the whole step, written to a hundredth.
        width = (each.end_s - each.start_s) / found.seconds * 900
        assert float(bar.get("width", "")) == pytest.approx(width, abs=0.006)
    labels = {each.text for each in chart.iter(f"{space}text")}
    assert {"d0", "d0->d2", "d2->d0", "d0 gradients", "forward", "backward"} <= labels
