import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import InputError, UsageError
from capstan.hardware import Cluster, Device
from capstan.hardware.cluster_yaml import read_cluster

rates = st.floats(min_value=1e-3, max_value=1e18)
latencies = st.floats(min_value=0, max_value=1e3)
names = st.text(min_size=1, max_size=5).filter(str.isprintable)


def device_of(name: str) -> st.SearchStrategy[Device]:
    return st.builds(
        Device,
        name=st.just(name),
        kind=st.just("cuda"),
        memory_bytes=st.integers(min_value=0, max_value=2**50),
        matmul_flops_per_s=st.dictionaries(st.sampled_from(["float32", "float16"]), rates),
        memory_bandwidth_bytes_per_s=rates,
    )


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    machines = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    size = len(machines)

    def matrix(entries: st.SearchStrategy[float]) -> tuple[tuple[float, ...], ...]:
        row = st.lists(entries, min_size=size, max_size=size).map(tuple)
        return tuple(draw(st.lists(row, min_size=size, max_size=size)))

    known = draw(st.sets(st.sampled_from(machines)))
    return Cluster(
        names=tuple(machines),
        latency_s=matrix(latencies),
        bandwidth_bytes_per_s=matrix(rates),
        devices={name: draw(device_of(name)) for name in sorted(known)},
    )


@pytest.fixture
def pair() -> Cluster:
    return Cluster(
        names=("ash", "oak"),
        latency_s=((0, 0.01), (0.02, 0)),
        bandwidth_bytes_per_s=((0, 1e6), (2e6, 0)),
    )


@given(clusters())
def test_yaml_gives_back_an_equal_cluster(cluster: Cluster) -> None:
    assert read_cluster(cluster.to_yaml(), source="x.yaml") == cluster


def test_a_file_gives_back_an_equal_cluster(pair: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "net.yaml"
    path.write_text(pair.to_yaml())
    assert Cluster.from_yaml(path) == pair
    assert hash(Cluster.from_yaml(path)) == hash(pair)


def test_the_two_directions_may_differ(pair: Cluster) -> None:
    assert pair.link("ash", "oak").bandwidth_bytes_per_s == 1e6
    assert pair.link("oak", "ash").bandwidth_bytes_per_s == 2e6
    assert pair.link("oak", "ash").seconds(2_000_000) == pytest.approx(1.02)


def test_the_diagonal_is_no_link_whatever_was_given_there(pair: Cluster) -> None:
    assert pair.latency_s[0][0] == 0.0
    assert pair.bandwidth_bytes_per_s[1][1] == math.inf
    with pytest.raises(UsageError, match="no link to itself"):
        pair.link("ash", "ash")


@given(clusters(), st.data())
def test_a_subset_keeps_links_and_devices(cluster: Cluster, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(cluster.names), min_size=1, unique=True))
    part = cluster.subset(chosen)
    assert part.names == tuple(chosen)
    for source in chosen:
        assert part.devices.get(source) == cluster.devices.get(source)
        for target in chosen:
            if source != target:
                assert part.link(source, target) == cluster.link(source, target)


def test_unknown_machines_are_refused(pair: Cluster) -> None:
    with pytest.raises(UsageError, match=r"no machine 'okk'. Did you mean 'oak'"):
        pair.link("ash", "okk")
    with pytest.raises(UsageError, match="no machine 'elm'"):
        pair.subset(["ash", "elm"])
    with pytest.raises(UsageError, match="at least one machine"):
        pair.subset([])
    with pytest.raises(UsageError, match="come twice: ash"):
        pair.subset(["ash", "ash"])


def test_a_cluster_prints_its_size_and_range(pair: Cluster) -> None:
    assert repr(pair) == "Cluster(2 machines: ash … oak, 10 ms to 20 ms, 1 MB/s to 2 MB/s)"
    assert repr(pair.subset(["ash"])) == "Cluster(1 machine: ash)"


GOOD = {
    "format": "capstan.cluster",
    "version": 1,
    "machines": ["a", "b"],
    "latency_s": [[None, 0.1], [0.1, None]],
    "bandwidth_bytes_per_s": [[None, 1e9], [1e9, None]],
}
FACTS = {"kind": "cuda", "memory_bytes": 1, "memory_bandwidth_bytes_per_s": 1.0}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("machines", ["a"], "latency_s has 2 rows for 1 machines"),
        ("machines", ["a", "a"], "come twice: a"),
        ("machines", ["a", "\x85"], "printable characters"),
        ("machines", ["a", ""], "printable characters"),
        ("machines", [True, "b"], r"machines\.0: Input should be a valid string"),
        ("latency_s", [[None, 0.1]], "latency_s has 1 rows for 2 machines"),
        ("latency_s", [[None, 0.1], [0.1]], "Row 1 of latency_s has 1 numbers"),
        ("latency_s", [[None, -0.1], [0.1, None]], r"latency of a -> b is -0\.1 s"),
        ("latency_s", [[None, math.nan], [0.1, None]], "latency of a -> b is nan s"),
        ("latency_s", [[None, None], [0.1, None]], "lacks row 0, column 1"),
        ("latency_s", [[None, "slow"], [0.1, None]], r"latency_s\.0\.1: .*valid number"),
        ("latency_s", [[None, True], [0.1, None]], r"latency_s\.0\.1: .*not a truth value"),
        ("bandwidth_bytes_per_s", [[None, 0], [1, None]], "bandwidth of a -> b is 0.0"),
        ("bandwidth_bytes_per_s", [[None, math.inf], [1, None]], "bandwidth of a -> b is inf"),
        ("format", "capstan.machine", "format: Input should be 'capstan.cluster'"),
        ("version", 2, "version: Input should be 1"),
        ("colour", "red", "colour: Extra inputs are not permitted"),
        ("devices", {"c": FACTS}, "no machine 'c'"),
        ("devices", {"a": FACTS | {"kind": "gpu"}}, "no kind of device 'gpu'"),
        ("devices", {"a": FACTS | {"memory_bytes": -5}}, "-5 bytes"),
        ("devices", {"a": {"kind": "cuda"}}, r"devices\.a\.memory_bytes: Field required"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_cluster(yaml.safe_dump(GOOD | {field: value}), source="net.yaml")


@pytest.mark.parametrize("field", sorted(GOOD))
def test_a_missing_field_is_named(field: str) -> None:
    record = {key: value for key, value in GOOD.items() if key != field}
    with pytest.raises(InputError, match=rf"{field}: Field required"):
        read_cluster(yaml.safe_dump(record), source="net.yaml")


def test_only_the_first_of_many_errors_are_shown() -> None:
    record = GOOD | {"latency_s": [["x"] * 8]}
    with pytest.raises(InputError, match="and 3 more"):
        read_cluster(yaml.safe_dump(record), source="net.yaml")


def test_numbers_in_the_short_form_that_yaml_reads_as_text_are_numbers() -> None:
    text = yaml.safe_dump(GOOD).replace("1000000000.0", "1e9")
    assert read_cluster(text, source="net.yaml").link("a", "b").bandwidth_bytes_per_s == 1e9


@pytest.mark.parametrize("text", ["a: [", "", "- 1", "!!python/object/apply:os.getcwd []"])
def test_text_that_describes_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"net\.yaml"):
        read_cluster(text, source="net.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        Cluster.from_yaml(tmp_path / "none.yaml")
