from collections.abc import Callable
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.allocation import (
    CostModel,
    Layout,
    Tasklet,
    TrainingTask,
    contiguous,
    pair_seconds,
    strided,
)
from capstan.errors import UsageError
from capstan.hardware import Cluster, scenario

SPOT_AWARE = Layout(
    groups=tuple(
        [tuple(range(k, 32, 4)) for k in range(4)] + [tuple(range(32 + 8 * j, 40 + 8 * j)) for j in range(4)]
    )
)
STRIDED, CONTIGUOUS = strided(64, stages=8), contiguous(64, stages=8)
# The published figures, computed with the original's functions and with an independent program.
PUBLISHED = [
    ("datacenter", STRIDED, 2.912, 0.527799129486084, 3.439799129486084),
    ("datacenter", CONTIGUOUS, 0.091, 16.889572143554688, 16.98057214355469),
    ("spot", STRIDED, 7.28, 42.22393035888672, 49.50393035888672),
    ("spot", CONTIGUOUS, 7.28, 42.22393035888672, 49.50393035888672),
    ("spot", SPOT_AWARE, 7.28, 24.354159832000732, 31.634159832000734),
    ("two-universities", STRIDED, 5.516857142857143, 10.56998258972168, 16.086839732578824),
    ("two-universities", CONTIGUOUS, 1.834, 15.81411683055333, 17.64811683055333),
    ("regional", STRIDED, 8.342084542908072, 26.459956474304192, 34.80204101721226),
    ("regional", CONTIGUOUS, 4.62, 34.620607858385355, 39.24060785838535),
    ("worldwide", STRIDED, 22.758423578824242, 26.459956474304192, 49.218380053128435),
    ("worldwide", CONTIGUOUS, 4.62, 54.81686520409369, 59.436865204093685),
]
GIB_TASKLET = Tasklet(gradient_bytes=0.65e9, activation_bytes=0.476837158203125e9)
CORRECTED = [
    ("datacenter", STRIDED, 3.446058, 3.485440),
    ("spot", SPOT_AWARE, 31.922944, 33.740160),
    ("two-universities", STRIDED, 16.212009, 16.999657),
    ("regional", STRIDED, 35.114965, 37.084085),
    ("worldwide", STRIDED, 49.531304, 51.500424),
]


def price(cluster: Cluster, tasklet: Tasklet, layout: Layout) -> tuple[float, float, float]:
    pairs = pair_seconds(cluster, tasklet, replicas=layout.num_replicas)
    costs = CostModel(pairs).price(layout.array[None])
    return float(costs.data_parallel_s[0]), float(costs.pipeline_s[0]), float(costs.total_s[0])


@pytest.mark.parametrize(("name", "layout", "data_parallel_s", "pipeline_s", "total_s"), PUBLISHED)
def test_every_published_cost_is_reproduced(
    name: str, layout: Layout, data_parallel_s: float, pipeline_s: float, total_s: float
) -> None:
    tasklet = TrainingTask().tasklet(stages=8, replicas=8, cost_model="paper")
    found = price(scenario(name), tasklet, layout)
    assert found == pytest.approx((data_parallel_s, pipeline_s, total_s), rel=0, abs=1e-9)


@pytest.mark.parametrize(("name", "layout", "typo_corrected_s", "corrected_s"), CORRECTED)
def test_corrected_totals(name: str, layout: Layout, typo_corrected_s: float, corrected_s: float) -> None:
    tasklet = TrainingTask().tasklet(stages=8, replicas=8)
    assert price(scenario(name), tasklet, layout)[2] == pytest.approx(corrected_s, rel=0, abs=1e-6)
    assert price(scenario(name), GIB_TASKLET, layout)[2] == pytest.approx(typo_corrected_s, rel=0, abs=1e-6)


def test_the_papers_constants() -> None:
    paper = TrainingTask().tasklet(stages=8, replicas=8, cost_model="paper")
    assert paper.gradient_bytes == 0.65e9
    assert paper.activation_bytes == pytest.approx(0.47124922275543213e9, rel=1e-15)
    corrected = TrainingTask().tasklet(stages=8, replicas=8)
    assert (corrected.gradient_bytes, corrected.activation_bytes) == (0.65e9, 0.512e9)


def test_the_papers_constants_are_refused_for_another_task() -> None:
    with pytest.raises(UsageError, match="the task is TrainingTask.*'corrected' for other tasks"):
        TrainingTask(hidden_size=4096).tasklet(stages=8, replicas=8, cost_model="paper")
    with pytest.raises(UsageError, match="no cost model 'papre'. Did you mean 'paper'"):
        TrainingTask().tasklet(stages=8, replicas=8, cost_model="papre")


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["parameters", "hidden_size", "batch_tokens"])
def test_a_task_without_size_is_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"{field} is .*above 0"):
        TrainingTask(**{field: value})  # type: ignore[arg-type]


sizes = st.sampled_from([(1, 3), (2, 2), (3, 1), (2, 3), (3, 2), (4, 2), (2, 4), (5, 1)])


@st.composite
def networks(draw: st.DrawFn, num_devices: int) -> Cluster:
    """Few different values, so that some devices are exchangeable and some entries equal."""
    latency = draw(_symmetric(num_devices, st.sampled_from([0.0, 0.001, 0.05, 0.2])))
    bandwidth = draw(_symmetric(num_devices, st.sampled_from([1e7, 1e8, 1.25e8, 1e9])))
    return Cluster(
        names=tuple(f"d{number}" for number in range(num_devices)),
        latency_s=latency,
        bandwidth_bytes_per_s=bandwidth,
    )


def _symmetric(
    size: int, entries: st.SearchStrategy[float]
) -> st.SearchStrategy[tuple[tuple[float, ...], ...]]:
    def filled(values: list[float]) -> tuple[tuple[float, ...], ...]:
        upper = np.zeros((size, size))
        upper[np.triu_indices(size, 1)] = values
        return tuple(map(tuple, (upper + upper.T).tolist()))

    count = size * (size - 1) // 2
    return st.lists(entries, min_size=count, max_size=count).map(filled)


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[Cluster, Layout]:
    stages, replicas = draw(sizes)
    order = draw(st.permutations(range(stages * replicas)))
    return draw(networks(stages * replicas)), Layout.from_array(np.array(order).reshape(stages, replicas))


TASKLET = Tasklet(gradient_bytes=1e8, activation_bytes=3e7)


def by_definition(cluster: Cluster, layout: Layout) -> float:
    """The formula word by word, over all matchings and all orders."""
    link: Callable[..., float] = lambda one, other, size: cluster.link(  # noqa: E731
        cluster.names[one], cluster.names[other]
    ).seconds(size)
    share = TASKLET.gradient_bytes / layout.num_replicas
    data_parallel = max(
        sum(2 * link(one, other, share) for other in group if other != one)
        for group in layout.groups
        for one in group
    )

    def edge(group: tuple[int, ...], other: tuple[int, ...]) -> float:
        return min(
            max(link(*pair, TASKLET.activation_bytes) for pair in zip(group, partners, strict=True))
            for partners in permutations(other)
        )

    path = min(sum(edge(a, b) for a, b in pairwise(order)) for order in permutations(layout.groups))
    return data_parallel + 2 * path


@given(laid_out())
@settings(max_examples=150, deadline=None)
def test_the_cost_is_the_formula_word_by_word(case: tuple[Cluster, Layout]) -> None:
    cluster, layout = case
    # Sums of at most 8 terms in another order.
    assert price(cluster, TASKLET, layout)[2] == pytest.approx(by_definition(cluster, layout), rel=1e-12)


@given(laid_out(), st.data())
@settings(max_examples=60, deadline=None)
def test_the_cost_does_not_depend_on_labels(case: tuple[Cluster, Layout], data: st.DataObject) -> None:
    cluster, layout = case
    order = data.draw(st.permutations(range(len(cluster.names))))
    renamed = cluster.subset([cluster.names[device] for device in order])
    place = {device: number for number, device in enumerate(order)}
    groups = [tuple(place[device] for device in group) for group in layout.groups]
    shuffled = Layout(
        groups=tuple(tuple(data.draw(st.permutations(group))) for group in data.draw(st.permutations(groups)))
    )
    assert price(renamed, TASKLET, shuffled) == pytest.approx(price(cluster, TASKLET, layout), rel=1e-12)


@given(laid_out(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_slower_link_never_lowers_the_cost(case: tuple[Cluster, Layout], data: st.DataObject) -> None:
    cluster, layout = case
    one, other = data.draw(st.permutations(range(len(cluster.names))))[:2]
    latency, bandwidth = np.array(cluster.latency_s), np.array(cluster.bandwidth_bytes_per_s)
    for a, b in ((one, other), (other, one)):
        latency[a, b] += data.draw(st.just(0.03))
        bandwidth[a, b] *= 0.5
    slower = Cluster(
        names=cluster.names,
        latency_s=tuple(map(tuple, latency)),
        bandwidth_bytes_per_s=tuple(map(tuple, bandwidth)),
    )
    # Equal where the link does not bind, but for the order of sums.
    assert price(slower, TASKLET, layout)[2] >= price(cluster, TASKLET, layout)[2] * (1 - 1e-12)


def test_exchangeable_devices_are_found() -> None:
    paper = TrainingTask().tasklet(stages=8, replicas=8)
    kinds = {
        name: pair_seconds(scenario(name), paper, replicas=8).classes
        for name in ("datacenter", "spot", "two-universities", "homogeneous")
    }
    assert kinds["datacenter"].tolist() == [device // 8 for device in range(64)]
    assert kinds["spot"].tolist() == [device // 4 for device in range(32)] + [8] * 32
    assert kinds["two-universities"].tolist() == [0] * 32 + [1] * 32
    assert kinds["homogeneous"].tolist() == [0] * 64


def uneven() -> Cluster:
    return Cluster(
        names=("a", "b"), latency_s=((0, 0.1), (0.3, 0)), bandwidth_bytes_per_s=((0, 1e8), (2e8, 0))
    )


def test_links_that_differ_by_direction_are_refused() -> None:
    with pytest.raises(UsageError, match="a -> b has 0.1 s and 1e.08 .*back 0.3 s .*1 pairs differ.*mean"):
        pair_seconds(uneven(), TASKLET, replicas=2)


def test_or_priced_by_the_mean_of_both_directions_when_asked_for() -> None:
    pairs = pair_seconds(uneven(), TASKLET, replicas=2, asymmetric="mean")
    there, back = 0.1 + 5e7 / 1e8, 0.3 + 5e7 / 2e8
    assert pairs.data_parallel[0, 1] == pytest.approx(there + back, rel=1e-15)
    assert pairs.boundary[1, 0] == pytest.approx((0.1 + 0.3 + 0.3 + 0.15) / 2, rel=1e-15)
    with pytest.raises(UsageError, match="asymmetric links 'max'"):
        pair_seconds(uneven(), TASKLET, replicas=2, asymmetric="max")
