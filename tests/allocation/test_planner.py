import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.allocation import (
    SEARCHES,
    Allocation,
    CostModel,
    Layout,
    TrainingTask,
    contiguous,
    evaluate_layout,
    pair_seconds,
    plan_allocation,
    read_cluster_file,
    regions_on_a_globe,
    strided,
)
from capstan.allocation.cost import as_listed_s
from capstan.errors import CapstanError, DoesNotFit, InputError, UsageError
from capstan.hardware import Cluster, Device, scenario
from capstan.plans import Plan, explain


@pytest.fixture(scope="module")
def worldwide() -> Allocation:
    return plan_allocation(scenario("worldwide"))


def test_a_plan_says_what_binds_and_what_else_would_cost(worldwide: Allocation) -> None:
    plan = worldwide.plan
    assert plan.seconds == pytest.approx(worldwide.cost_s) == pytest.approx(51.500424, abs=1e-6)
    assert "in stage 0 Seoul-32 waits longest, 4.34 s of it for Ireland-56" in plan.bound
    prices = {each.name: each.seconds for each in plan.alternatives}
    assert prices["strided"] == pytest.approx(51.500424, abs=1e-6)
    assert prices["contiguous"] == pytest.approx(64.104112, abs=1e-6)
    assert prices["second best"] > worldwide.cost_s
    assert prices["random ranks"] > 3 * worldwide.cost_s
    data_parallel, pipeline = plan.phases
    # Each device waits for its seven peers, each boundary is crossed forward and backward.
    assert sum(data_parallel.busy_s.values()) == pytest.approx(worldwide.data_parallel_s)
    assert sum(pipeline.busy_s.values()) == pytest.approx(worldwide.pipeline_s)
    # 8 stages × 8 members × 7 peers × 0.65 GB / 8, there and back; 7 boundaries × 8 replicas × 0.512 GB.
    assert data_parallel.traffic.on("within stages") == 2 * 8 * 8 * 7 * 81_250_000
    assert pipeline.traffic.on("between stages") == 2 * 7 * 8 * 512_000_000
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "random ranks" in explain(plan)


def test_ranks_follow_the_links_that_the_cost_counts(worldwide: Allocation) -> None:
    layout = worldwide.layout
    assert sorted(layout.ranks) == list(range(64))
    assert layout.ranks[:8] == tuple(group[0] for group in layout.groups)
    names = scenario("worldwide").names
    for replica in range(8):
        places = {names[device].split("-")[0] for device in layout.ranks[8 * replica : 8 * replica + 8]}
        assert len(places) == 1, "a pipeline leaves its region"


@pytest.mark.parametrize("search", SEARCHES)
@given(seed=st.integers(0, 1000), shape=st.sampled_from([(1, 4), (4, 1), (2, 3), (3, 2), (4, 2), (1, 1)]))
@settings(max_examples=8, deadline=None)
def test_a_layout_used_as_listed_costs_what_was_planned_and_no_more_than_a_baseline(
    search: str, seed: int, shape: tuple[int, int]
) -> None:
    stages, replicas = shape
    cluster = regions_on_a_globe(stages * replicas, devices_per_region=1, seed=seed)
    found = plan_allocation(cluster, stages=stages, search=search, seed=seed)
    tasklet = TrainingTask().tasklet(stages=stages, replicas=replicas)
    pairs = pair_seconds(cluster, tasklet, replicas=replicas)
    # The order of stages and of members is the one that the cost assumes; terms in another order.
    assert as_listed_s(pairs, found.layout.array[None])[0] == pytest.approx(found.cost_s, rel=1e-12)
    count = stages * replicas
    for hand in (strided(count, stages=stages), contiguous(count, stages=stages)):
        assert found.cost_s <= CostModel(pairs).total_s(hand.array[None])[0] * (1 + 1e-12)
    assert found.cost_s <= min(each.seconds for each in found.plan.alternatives) * (1 + 1e-12)
    ElementTree.fromstring(found.svg)


def test_the_same_seed_gives_the_same_plan() -> None:
    cluster = regions_on_a_globe(5, devices_per_region=4, seed=2)
    first, second = (plan_allocation(cluster, stages=5, seed=3) for _ in range(2))
    assert first.layout == second.layout
    assert first.plan == second.plan


def test_search_time_is_the_clocks() -> None:
    ticks = iter([10.0, 12.5])
    assert plan_allocation(scenario("homogeneous"), clock=lambda: next(ticks)).search_s == 2.5


def test_evaluating_a_plans_layout_gives_its_price(worldwide: Allocation) -> None:
    cluster = scenario("worldwide")
    again = evaluate_layout(cluster, worldwide.layout)
    assert (again.data_parallel_s, again.pipeline_s) == (worldwide.data_parallel_s, worldwide.pipeline_s)
    assert [each.name for each in again.plan.alternatives] == ["strided", "contiguous", "random ranks"]
    with pytest.raises(UsageError, match="holds 4 devices, but the cluster has 64"):
        evaluate_layout(cluster, contiguous(4, stages=2))


def test_many_stages_are_put_in_order_by_two_opt_which_is_said() -> None:
    found = plan_allocation(regions_on_a_globe(13, devices_per_region=1), stages=13)
    assert ("order of stages", "2-opt") in {(each.name, each.value) for each in found.plan.choices}
    path = found.layout.groups
    assert sorted(path) == [(device,) for device in range(13)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 0}, "0 stages make no pipeline"),
        ({"stages": -2}, "-2 stages make no pipeline"),
        ({"stages": 12}, "8 devices cannot hold 12 stages.*fewer devices than stages.*1, 2, 4, 8"),
        ({"stages": 3}, "8 devices cannot hold 3 stages.*do not divide evenly"),
        ({"search": "genetic"}, "no search 'genetic'"),
        ({"cost_model": "fair"}, "no cost model 'fair'"),
        ({"asymmetric": "max"}, "no treatment of asymmetric links 'max'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_allocation(regions_on_a_globe(8, devices_per_region=1), **arguments)  # type: ignore[arg-type]


def with_memory(memory_bytes: int) -> Cluster:
    plain = regions_on_a_globe(2, devices_per_region=1)
    small = Device(
        name=plain.names[1],
        kind="cuda",
        memory_bytes=memory_bytes,
        matmul_flops_per_s={},
        memory_bandwidth_bytes_per_s=1e11,
    )
    return Cluster(
        names=plain.names,
        latency_s=plain.latency_s,
        bandwidth_bytes_per_s=plain.bandwidth_bytes_per_s,
        devices={small.name: small},
    )


def test_a_model_that_fits_nowhere_is_refused() -> None:
    # 1.3e9 parameters × 16 bytes in two stages.
    need = 10_400_000_000
    fits = plan_allocation(with_memory(need), stages=2)
    assert fits.plan.peak_bytes == {"region1-1": need}
    with pytest.raises(DoesNotFit, match="needs at least 9.69 GiB.*region1-1 has 9.69 GiB.*1 of 2 devices"):
        plan_allocation(with_memory(need - 1), stages=2)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one group"),
        ([[]], "at least one device"),
        ([[0, 1], [2]], "hold 1 to 2"),
        ([[0, 1], [1, 2]], "device 1 comes twice"),
        ([[0, 1], [2, 5]], "device 3 is missing"),
        ([[0, -1]], "device 1 is missing"),
    ],
)
def test_a_layout_that_is_none_is_refused(groups: list[list[int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout(groups=tuple(map(tuple, groups)))


CSV = "source,target,latency_s,bandwidth_bytes_per_s\n"


def test_a_csv_of_pairs_is_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "net.csv"
    path.write_text(CSV + "a,b,0.01,1e8\nb, c ,0.02,2e8\n\nc,a,0.03,3e8\na,c,0.04,3e8\n")
    cluster = read_cluster_file(path)
    assert cluster.names == ("a", "b", "c")
    assert cluster.link("b", "a").latency_s == 0.01
    assert cluster.link("c", "b").bandwidth_bytes_per_s == 2e8
    assert (cluster.link("c", "a").latency_s, cluster.link("a", "c").latency_s) == (0.03, 0.04)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with nothing"),
        ("a,b,0.1,1e8\n", "should begin with the line source,target"),
        (CSV, "no pair of devices"),
        (CSV + "a,b,0.1\n", "line 2 should have 4 cells but has 3"),
        (CSV + "a,a,0.1,1e8\n", "line 2 is a link from 'a' to itself"),
        (CSV + "a,b,fast,1e8\n", "line 2 should have a finite number where it has 'fast'"),
        (CSV + "a,b,0.1,nan\n", "line 2 should have a finite number where it has 'nan'"),
        (CSV + "a,b,0.1,\n", "line 2 should have a finite number where it has ''"),
        (CSV + "a,b,-0.1,1e8\n", r"latency of a -> b is -0\.1"),
        (CSV + "a,b,0.1,0\n", r"bandwidth of a -> b is 0\.0"),
        (CSV + "a,b,0.1,1e8\nb,c,0.1,1e8\n", "lacks the pair a, c; 3 devices have 3 pairs"),
        (CSV + "a,b,0.1,1e8\na,b,0.1,1e8\n", "a -> b twice"),
        (CSV + ",b,0.1,1e8\n", "printable characters"),
    ],
)
def test_a_csv_that_says_no_cluster_names_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_cluster_file(path)


def test_files_that_are_no_cluster_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither \.yaml nor \.csv"):
        read_cluster_file(tmp_path / "net.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_cluster_file(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="cannot be read"):
        read_cluster_file(tmp_path / "bad.csv")


def test_a_globe_has_near_links_faster_than_far_ones() -> None:
    cluster = regions_on_a_globe(6, devices_per_region=2, seed=1)
    latency, bandwidth = np.array(cluster.latency_s), np.array(cluster.bandwidth_bytes_per_s)
    across = ~np.kron(np.eye(6, dtype=bool), np.ones((2, 2), dtype=bool))
    order = np.argsort(latency[across])
    assert (np.diff(bandwidth[across][order]) <= 0).all()
    assert latency[across].max() <= 0.005 + 1.5 * np.pi * 6371 / 200_000
    assert cluster == regions_on_a_globe(6, devices_per_region=2, seed=1)
    with pytest.raises(CapstanError, match="no cluster"):
        regions_on_a_globe(0, devices_per_region=2)
