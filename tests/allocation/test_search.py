import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.allocation import (
    CostModel,
    Evolution,
    Tasklet,
    TrainingTask,
    contiguous,
    pair_seconds,
    regions_on_a_globe,
    search_all,
    search_annealing,
    search_evolution,
    strided,
)
from capstan.allocation.evolution import crossover, random_layouts
from capstan.allocation.exhaustive import all_layouts, num_layouts
from capstan.allocation.local_search import cyclic_moves, exchange_until_best
from capstan.allocation.pair_seconds import Numbers
from capstan.allocation.starts import dealt, structured_starts
from capstan.errors import UsageError
from capstan.hardware import Cluster, scenario
from capstan.hardware.regions import WORLDWIDE, region_route

BARS = {
    "datacenter": 3.440,
    "spot": 31.634,
    "two-universities": 16.087,
    "regional": 34.802,
    "worldwide": 49.218,
}
# The bars are printed to a thousandth: 31.634159... is 31.634.
PRINTED = 1e-3


def model_of(cluster: Cluster, *, stages: int, cost_model: str = "paper") -> CostModel:
    replicas = len(cluster.names) // stages
    tasklet = TrainingTask().tasklet(stages=8, replicas=8, cost_model=cost_model)
    return CostModel(pair_seconds(cluster, tasklet, replicas=replicas))


def total(model: CostModel, layout: Numbers) -> float:
    return float(model.total_s(layout[None])[0])


def evolved(name: str, seed: int, settings: Evolution | None = None) -> float:
    model = model_of(scenario(name), stages=8)
    return total(model, search_evolution(model, stages=8, rng=np.random.default_rng(seed), settings=settings))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", BARS)
def test_the_search_reaches_the_best_known_cost(name: str, seed: int) -> None:
    assert evolved(name, seed) <= BARS[name] + PRINTED


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 10))
@pytest.mark.parametrize("name", BARS)
def test_the_search_reaches_the_best_known_cost_for_every_seed(name: str, seed: int) -> None:
    assert evolved(name, seed) <= BARS[name] + PRINTED


def test_from_random_layouts_alone_the_spot_setting_is_a_plateau() -> None:
    found = evolved("spot", 0, Evolution(structured=False, trials=10))
    assert found == pytest.approx(49.50393035888672, abs=1e-9)


def one_per_region() -> Cluster:
    routes = [[region_route(one, other) for other in WORLDWIDE] for one in WORLDWIDE]
    return Cluster(
        names=WORLDWIDE,
        latency_s=tuple(tuple(route.latency_s for route in row) for row in routes),
        bandwidth_bytes_per_s=tuple(tuple(route.bandwidth_bytes_per_s for route in row) for row in routes),
    )


@pytest.mark.parametrize(
    ("stages", "count", "best", "groups"),
    [
        (
            4,
            105,
            (6.716278, 29.144533, 35.860812),
            "Oregon Virginia|Ohio London|Tokyo Seoul|Frankfurt Ireland",
        ),
        (
            2,
            35,
            (18.676542, 7.029470, 25.706012),
            "Oregon Tokyo London Ireland|Virginia Ohio Seoul Frankfurt",
        ),
    ],
)
def test_brute_force_finds_the_published_optima(
    stages: int, count: int, best: tuple[float, float, float], groups: str
) -> None:
    model = model_of(one_per_region(), stages=stages)
    assert num_layouts(8, stages=stages) == len(all_layouts(8, stages=stages)) == count
    found = search_all(model, stages=stages)
    costs = model.price(found[None])
    # Published to a millionth.
    assert [float(costs.data_parallel_s[0]), float(costs.pipeline_s[0])] == pytest.approx(best[:2], abs=1e-6)
    assert total(model, found) == pytest.approx(best[2], abs=1e-6)
    assert {frozenset(WORLDWIDE[device] for device in group) for group in found} == {
        frozenset(group.split()) for group in groups.split("|")
    }


def test_the_other_figures_of_the_four_by_two_case() -> None:
    model = model_of(one_per_region(), stages=4)
    totals = np.sort(model.total_s(all_layouts(8, stages=4)))
    assert (totals[1], totals[-1], totals.mean()) == pytest.approx(
        (36.402941, 55.734076, 45.446700), abs=1e-6
    )
    assert total(model, np.arange(8).reshape(4, 2)) == pytest.approx(53.533549, abs=1e-6)
    assert model.next_best_s(totals[0]) == totals[1]


def drawn_cluster(seed: int) -> Cluster:
    """Eight devices without any structure."""
    rng = np.random.default_rng([8, seed])
    latency, bandwidth = np.triu(rng.uniform(0, 0.2, (8, 8)), 1), np.triu(rng.uniform(2e7, 3e8, (8, 8)), 1)
    return Cluster(
        names=tuple("abcdefgh"),
        latency_s=tuple(map(tuple, (latency + latency.T).tolist())),
        bandwidth_bytes_per_s=tuple(map(tuple, (bandwidth + bandwidth.T).tolist())),
    )


@pytest.mark.parametrize("stages", [2, 4])
def test_evolution_agrees_with_brute_force_on_random_networks(stages: int) -> None:
    for seed in range(100):
        cluster = drawn_cluster(seed)
        oracle, searched = model_of(cluster, stages=stages), model_of(cluster, stages=stages)
        best = total(oracle, search_all(oracle, stages=stages))
        found = search_evolution(searched, stages=stages, rng=np.random.default_rng(seed))
        # The same layout, whose terms may be summed in another order.
        assert total(searched, found) == pytest.approx(best, rel=1e-12), seed


def test_all_layouts_are_different_and_hold_every_device() -> None:
    layouts = all_layouts(6, stages=3)
    assert len({frozenset(map(frozenset, layout.tolist())) for layout in layouts}) == 15
    assert (np.sort(layouts.reshape(15, -1)) == np.arange(6)).all()


def test_too_many_layouts_are_refused() -> None:
    with pytest.raises(UsageError, match=r"e\+47 layouts of 64 devices.*evolutionary"):
        search_all(model_of(scenario("spot"), stages=8), stages=8)


@pytest.mark.parametrize("search", [search_evolution, search_annealing])
def test_the_same_seed_finds_the_same_layout(search) -> None:  # type: ignore[no-untyped-def]
    found = [
        search(model_of(regions_on_a_globe(4, devices_per_region=3), stages=4), stages=4, rng=rng)
        for rng in map(np.random.default_rng, [7, 7])
    ]
    assert (found[0] == found[1]).all()


shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(shapes, st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_every_move_keeps_every_device_once(shape: tuple[int, int], seed: int) -> None:
    stages, replicas = shape
    rng = np.random.default_rng(seed)
    cluster = regions_on_a_globe(stages * replicas, devices_per_region=1, seed=seed)
    tasklet = Tasklet(gradient_bytes=1e9, activation_bytes=1e8)
    model = CostModel(pair_seconds(cluster, tasklet, replicas=replicas))
    one, other = random_layouts(stages * replicas, stages=stages, count=2, rng=rng)
    made = [
        crossover(one, other, rng)[None],
        cyclic_moves(model, one, rng),
        exchange_until_best(model, one, rng, most=40).layout[None],
        structured_starts(model.pairs, stages=stages),
        search_annealing(model, stages=stages, rng=rng, steps=3)[None],
        search_evolution(
            model, stages=stages, rng=rng, settings=Evolution(trials=2, random_layouts=2, population=4)
        )[None],
    ]
    for layouts in made:
        assert layouts.shape[1:] == (stages, replicas)
        assert (np.sort(layouts.reshape(len(layouts), -1)) == np.arange(stages * replicas)).all()


def test_crossover_takes_stages_of_the_first_parent_for_five_devices() -> None:
    one, other = strided(64, stages=8).array, contiguous(64, stages=8).array
    child = crossover(one, other, np.random.default_rng(0))
    stage_of = {int(device): stage for stage, group in enumerate(child) for device in group}
    assert sum(stage_of[device] == device % 8 and device % 8 != device // 8 for device in range(64)) >= 4
    # Five devices move, each with one that gives it its place.
    assert sum(stage_of[device] != device // 8 for device in range(64)) <= 10


def test_exchanges_never_make_a_layout_dearer() -> None:
    model = model_of(regions_on_a_globe(6, devices_per_region=2, seed=3), stages=3)
    for layout in random_layouts(12, stages=3, count=10, rng=np.random.default_rng(0)):
        better = exchange_until_best(model, layout, np.random.default_rng(1), most=200).layout
        assert total(model, better) <= total(model, layout)


def test_dealing_spreads_each_block_over_its_stages() -> None:
    assert dealt(np.arange(8), (), 2).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert dealt(np.arange(8), (1, 2, 3), 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert dealt(np.arange(8), (2,), 2).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize("change", [{"population": 1}, {"trials": -1}, {"exchanges": -1}])
def test_a_search_of_nothing_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="give at least"):
        Evolution(**change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="annealing of 0 steps"):
        search_annealing(
            model_of(one_per_region(), stages=2), stages=2, rng=np.random.default_rng(0), steps=0
        )
