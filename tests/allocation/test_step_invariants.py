"""The simulated step against a recursion of its own, and what must hold whatever the network."""

import functools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.allocation import Interfaces, Layout, StepTask, simulate_step
from capstan.allocation.step_simulation import stage_order
from capstan.errors import UsageError
from capstan.hardware import Cluster

# Sixteenths and powers of two add up exactly in floats, so times are compared with ==.
ticks = st.integers(0, 32).map(lambda number: number / 16)
busy = st.integers(1, 32).map(lambda number: number / 16)
rates = st.sampled_from([4.0, 2.0, 1.0, 0.5, 0.25])
schedules = st.sampled_from(["gpipe", "1f1b"])


def cluster_of(latency_s: list[list[float]], bandwidth: list[list[float]]) -> Cluster:
    return Cluster(
        names=tuple(f"d{number}" for number in range(len(latency_s))),
        latency_s=tuple(map(tuple, latency_s)),
        bandwidth_bytes_per_s=tuple(map(tuple, bandwidth)),
    )


@st.composite
def steps(draw: st.DrawFn, *, most_replicas: int = 3) -> dict[str, Any]:
    """Everything that a step is made of, drawn; links differ by direction."""
    stages, replicas = draw(st.integers(1, 4)), draw(st.integers(1, most_replicas))
    count = stages * replicas

    def matrix(of: st.SearchStrategy[float]) -> list[list[float]]:
        return [[draw(of) for _ in range(count)] for _ in range(count)]

    def numbers(of: st.SearchStrategy[float], size: int = count) -> list[float]:
        return [draw(of) for _ in range(size)]

    devices = draw(st.permutations(range(count)))
    return {
        "latency_s": matrix(ticks),
        "bandwidth": matrix(rates),
        "groups": [devices[stage * replicas : (stage + 1) * replicas] for stage in range(stages)],
        "task": {
            "micro_batches": draw(st.integers(1, 5)),
            "forward_s": numbers(busy),
            "backward_s": numbers(busy),
            "activation_bytes": draw(ticks),
            "backward_bytes": draw(ticks),
            "gradient_bytes": numbers(ticks, stages),
            "schedule": draw(schedules),
        },
        "interfaces": draw(st.sampled_from([None, (numbers(rates), numbers(rates))])),
    }


def run(step: dict[str, Any]) -> float:
    interfaces = step["interfaces"]
    return simulate_step(
        cluster_of(step["latency_s"], step["bandwidth"]),
        Layout(groups=tuple(map(tuple, step["groups"]))),
        StepTask(**step["task"]),
        interfaces=interfaces and Interfaces(up_bytes_per_s=interfaces[0], down_bytes_per_s=interfaces[1]),
    ).seconds


def recursion(step: dict[str, Any]) -> float:
    """When the last of one replica's works ends, each asked for what it waits for."""
    (*chain,) = (group[0] for group in step["groups"])
    task, stages = StepTask(**step["task"]), len(chain)
    orders = [stage_order(stage, stages, task) for stage in range(stages)]
    infinite = [math.inf] * stages
    up, down = step["interfaces"] or (infinite, infinite)

    def neighbour(stage: int, direction: str, sign: int) -> int | None:
        other = stage + (sign if direction == "forward" else -sign)
        return other if 0 <= other < stages else None

    def bytes_of(direction: str) -> float:
        sizes: dict[str, float] = step["task"]
        return sizes["activation_bytes" if direction == "forward" else "backward_bytes"]

    def link_s(source: int, target: int, direction: str) -> float:
        rate = min(step["bandwidth"][chain[source]][chain[target]], up[chain[source]], down[chain[target]])
        return bytes_of(direction) / float(rate)

    @functools.cache
    def computed(stage: int, work: tuple[str, int]) -> float:
        place = orders[stage].index(work)
        ready: float = computed(stage, orders[stage][place - 1]) if place else 0.0
        if neighbour(stage, work[0], -1) is not None:
            ready = max(ready, arrived(stage, work))
        seconds: float = step["task"][f"{work[0]}_s"][chain[stage]]
        return ready + seconds

    @functools.cache
    def sent(stage: int, work: tuple[str, int]) -> float:
        """When a stage begins to send what it computed."""
        target = neighbour(stage, work[0], +1)
        assert target is not None
        start: float = computed(stage, work)
        earlier = [
            each
            for each in orders[stage][: orders[stage].index(work)]
            if neighbour(stage, each[0], +1) is not None
        ]
        same_link = [each for each in earlier if each[0] == work[0]]
        if same_link:
            start = max(start, sent(stage, same_link[-1]) + link_s(stage, target, work[0]))
        if earlier:
            start = max(start, sent(stage, earlier[-1]) + bytes_of(earlier[-1][0]) / up[chain[stage]])
        return start

    @functools.cache
    def first_byte(stage: int, work: tuple[str, int]) -> float:
        source = neighbour(stage, work[0], -1)
        assert source is not None
        start: float = sent(source, work) + step["latency_s"][chain[source]][chain[stage]]
        incoming = [each for each in orders[max(stage - 1, 0)] if neighbour(stage, each[0], -1) is not None]
        earlier = incoming[: incoming.index(work)]
        same_link = [each for each in earlier if each[0] == work[0]]
        if same_link:
            start = max(start, first_byte(stage, same_link[-1]) + link_s(source, stage, work[0]))
        if earlier:
            start = max(start, first_byte(stage, earlier[-1]) + bytes_of(earlier[-1][0]) / down[chain[stage]])
        return start

    def arrived(stage: int, work: tuple[str, int]) -> float:
        source = neighbour(stage, work[0], -1)
        assert source is not None
        if step["interfaces"] is None:
            latency_s: float = step["latency_s"][chain[source]][chain[stage]]
            return sent(source, work) + link_s(source, stage, work[0]) + latency_s
        return first_byte(stage, work) + link_s(source, stage, work[0])

    return max(computed(stage, order[-1]) for stage, order in enumerate(orders))


@given(steps(most_replicas=1))
@settings(deadline=None, max_examples=150)
def test_uneven_chains_take_what_a_recursion_says(step: dict[str, Any]) -> None:
    assert run(step) == recursion(step)


@given(steps(), st.data())
@settings(deadline=None, max_examples=150)
def test_what_is_slower_or_larger_never_makes_a_step_shorter(
    step: dict[str, Any], data: st.DataObject
) -> None:
    count = len(step["latency_s"])
    before_s, device = run(step), data.draw(st.integers(0, count - 1))
    other = data.draw(st.integers(0, count - 1))
    worse = data.draw(
        st.sampled_from(
            ["latency", "bandwidth", "forward_s", "backward_s", "activation_bytes", "backward_bytes",
             "gradient_bytes", "up", "down"]
        )
    )  # fmt: skip
    task = step["task"]
    match worse:
        case "latency":
            step["latency_s"][device][other] += 0.5
        case "bandwidth":
            step["bandwidth"][device][other] /= 2
        case "forward_s" | "backward_s":
            task[worse][device] += 0.5
        case "activation_bytes" | "backward_bytes":
            task[worse] *= 2
        case "gradient_bytes":
            task[worse][data.draw(st.integers(0, len(step["groups"]) - 1))] += 0.5
        case _ if step["interfaces"]:
            step["interfaces"][worse == "down"][device] /= 2
    assert run(step) >= before_s


@pytest.mark.parametrize(("share_s", "seconds"), [(1.0, 20.0), (4.0, 20.0)])
def test_sums_do_not_overtake_shares(share_s: float, seconds: float) -> None:
    """d0 has early what comes to it where d1 -> d0 is fast; d2, which sends slowly, waits for its share."""
    bandwidth = [[1.0, 0.25, 0.25], [1 / share_s, 1.0, 1.0], [1.0, 0.125, 1.0]]
    step: dict[str, Any] = {
        "latency_s": [[0.0] * 3 for _ in range(3)],
        "bandwidth": bandwidth,
        "groups": [[0, 1, 2]],
        "task": {
            "micro_batches": 1, "forward_s": [1.0] * 3, "backward_s": [1.0] * 3, "activation_bytes": 0.0,
            "gradient_bytes": 3.0,
        },
        "interfaces": None,
    }  # fmt: skip
    assert run(step) == seconds


@given(steps(), st.data())
@settings(deadline=None, max_examples=80)
def test_other_numbers_for_the_same_devices_change_nothing(step: dict[str, Any], data: st.DataObject) -> None:
    count = len(step["latency_s"])
    order = data.draw(st.permutations(range(count)))
    number = {device: place for place, device in enumerate(order)}

    def rows(matrix: list[list[float]]) -> list[list[float]]:
        return [[matrix[one][other] for other in order] for one in order]

    def picked(values: list[float]) -> list[float]:
        return [values[device] for device in order]

    again = {
        "latency_s": rows(step["latency_s"]),
        "bandwidth": rows(step["bandwidth"]),
        "groups": [[number[device] for device in group] for group in step["groups"]],
        "task": step["task"] | {name: picked(step["task"][name]) for name in ("forward_s", "backward_s")},
        "interfaces": step["interfaces"] and tuple(map(picked, step["interfaces"])),
    }
    assert run(again) == run(step)


@given(steps())
@settings(deadline=None, max_examples=50)
def test_interfaces_that_are_wide_enough_change_nothing(step: dict[str, Any]) -> None:
    count = len(step["latency_s"])
    # Latency and bandwidth are added in another order, and a third of a share is no binary fraction.
    assert run(step | {"interfaces": ([math.inf] * count,) * 2}) == pytest.approx(
        run(step | {"interfaces": None}), rel=1e-12
    )


@given(steps(most_replicas=1), rates)
@settings(deadline=None, max_examples=50)
def test_gpipe_behind_an_interface_is_gpipe_on_links_as_slow(step: dict[str, Any], rate: float) -> None:
    """All messages of its forward go one way, and so do those of its backward: nothing shares."""
    count = len(step["latency_s"])
    step["task"]["schedule"] = "gpipe"
    capped = step | {"interfaces": ([rate] * count, [math.inf] * count)}
    slow = [[min(each, rate) for each in row] for row in step["bandwidth"]]
    assert run(capped) == run(step | {"bandwidth": slow, "interfaces": None})


def test_transfers_of_one_device_share_its_interface() -> None:
    """Of three members each sends two shares of a second at once; half the rate, twice the time."""
    fast = [[8.0] * 3 for _ in range(3)]
    step: dict[str, Any] = {
        "latency_s": [[0.0] * 3 for _ in range(3)],
        "bandwidth": fast,
        "groups": [[0, 1, 2]],
        "task": {
            "micro_batches": 1, "forward_s": [1.0] * 3, "backward_s": [1.0] * 3, "activation_bytes": 0.0,
            "gradient_bytes": 3.0,
        },
        "interfaces": ([1.0] * 3, [1.0] * 3),
    }  # fmt: skip
    assert run(step) == 2 + 2 * 2 * 1.0
    assert run(step | {"interfaces": ([0.5, 1.0, 1.0], [1.0] * 3)}) == 2 + 2 * 2 * 2.0


@pytest.mark.parametrize(
    ("up", "down", "message"),
    [
        ([1.0, 0.0], [1.0] * 2, "up_bytes_per_s has 0.0"),
        ([1.0] * 2, [1.0, math.nan], "down_bytes_per_s has"),
        ([1.0], [1.0] * 2, "up_bytes_per_s has 1 entries for 2 devices"),
    ],
)
def test_interfaces_that_are_none_are_refused(up: list[float], down: list[float], message: str) -> None:
    task = StepTask(micro_batches=1, forward_s=[1.0] * 2, backward_s=[1.0] * 2, activation_bytes=1.0)
    with pytest.raises(UsageError, match=message):
        simulate_step(
            cluster_of([[0.0] * 2] * 2, [[1.0] * 2] * 2), Layout(groups=((0,), (1,))), task,
            interfaces=Interfaces(up_bytes_per_s=up, down_bytes_per_s=down),
        )  # fmt: skip


def test_gradient_bytes_are_given_for_every_stage() -> None:
    task = StepTask(
        micro_batches=1, forward_s=[1.0] * 2, backward_s=[1.0] * 2, activation_bytes=1.0, gradient_bytes=[1.0]
    )
    with pytest.raises(UsageError, match="gradient_bytes has 1 entries for 2 stages"):
        simulate_step(cluster_of([[0.0] * 2] * 2, [[1.0] * 2] * 2), Layout(groups=((0,), (1,))), task)
