from itertools import combinations

import pytest

from capstan.errors import UsageError
from capstan.hardware import Cluster, scenario
from capstan.hardware.regions import REGIONS, SCENARIOS, region_link, region_route


@pytest.mark.parametrize(
    ("first", "second", "delay_ms", "gbit_per_s"),
    [
        ("Oregon", "Virginia", 67, 0.79),
        ("Oregon", "Ohio", 49, 1.10),
        ("Oregon", "Tokyo", 96, 0.523),
        ("Oregon", "Sydney", 139, 0.36),
        ("Oregon", "Ireland", 124, 0.482),
        ("Virginia", "Ohio", 11, 1.12),
        ("Virginia", "Singapore", 230, 0.364),
        ("Virginia", "London", 76, 1.16),
        ("Virginia", "Ireland", 67, 1.05),
        ("Ohio", "Tokyo", 130, 0.694),
        ("Ohio", "Frankfurt", 99, 0.799),
        ("Ohio", "Ireland", 77, 1.14),
        ("Tokyo", "Seoul", 34, 1.10),
        ("Tokyo", "Sydney", 100, 0.761),
        ("Tokyo", "Ireland", 199, 0.465),
        ("Seoul", "Singapore", 74, 1.14),
        ("Seoul", "London", 238, 0.342),
        ("Seoul", "Ireland", 228, 0.335),
        ("Singapore", "Sydney", 92, 0.816),
        ("Singapore", "Ireland", 179, 0.492),
        ("Sydney", "London", 262, 0.326),
        ("Sydney", "Ireland", 254, 0.344),
        ("London", "Frankfurt", 14, 1.14),
        ("London", "Ireland", 12, 1.09),
        ("Frankfurt", "Ireland", 24, 1.08),
    ],
)
def test_region_table(first: str, second: str, delay_ms: float, gbit_per_s: float) -> None:
    assert region_route(first, second) == region_route(second, first) == (delay_ms, gbit_per_s)


def test_every_pair_of_regions_is_in_the_table() -> None:
    routes = [region_route(first, second) for first, second in combinations(REGIONS, 2)]
    assert len(routes) == 45
    # Sums over the published table: a digit changed anywhere shows here.
    assert sum(route.delay_ms for route in routes) == 6148
    assert sum(route.gbit_per_s for route in routes) == pytest.approx(29.617, abs=1e-9)


def test_milliseconds_and_gigabits_become_seconds_and_bytes() -> None:
    link = region_link("Oregon", "Tokyo")
    assert link.latency_s == pytest.approx(0.096, rel=1e-12)
    assert link.bandwidth_bytes_per_s == pytest.approx(0.523e9 / 8, rel=1e-12)
    assert (link.source, link.target) == ("Oregon", "Tokyo")


def test_an_unknown_region_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'Tokyo'"):
        region_route("Tokio", "Seoul")


@pytest.mark.parametrize(
    ("name", "first", "second", "delay_ms", "gbit_per_s"),
    [
        ("datacenter", 0, 7, 0, 100),
        ("datacenter", 56, 63, 0, 100),
        ("datacenter", 7, 8, 0, 3.125),
        ("datacenter", 0, 63, 0, 3.125),
        ("spot", 0, 3, 0, 100),
        ("spot", 28, 31, 0, 100),
        ("spot", 3, 4, 0, 1.25),
        ("spot", 31, 32, 0, 1.25),
        ("spot", 32, 33, 0, 1.25),
        ("spot", 62, 63, 0, 1.25),
        ("two-universities", 0, 31, 1, 5),
        ("two-universities", 32, 63, 1, 5),
        ("two-universities", 31, 32, 11, 1.12),
        ("regional", 0, 15, 5, 2),
        ("regional", 48, 63, 5, 2),
        ("regional", 0, 16, 67, 1.15),
        ("regional", 0, 32, 59, 1.05),
        ("regional", 0, 48, 11, 1.12),
        ("regional", 16, 32, 12, 1.25),
        ("regional", 16, 48, 49, 1.10),
        ("regional", 32, 48, 52, 1.02),
        ("worldwide", 0, 7, 5, 2),
        ("worldwide", 0, 8, 67, 0.79),
        ("worldwide", 8, 16, 11, 1.12),
        ("worldwide", 24, 32, 34, 1.10),
        ("worldwide", 32, 40, 238, 0.342),
        ("worldwide", 47, 48, 14, 1.14),
        ("worldwide", 55, 63, 24, 1.08),
        ("worldwide", 0, 63, 124, 0.482),
        ("homogeneous", 0, 1, 50, 1),
        ("homogeneous", 0, 63, 50, 1),
    ],
)
def test_scenarios_hold_the_published_values(
    name: str, first: int, second: int, delay_ms: float, gbit_per_s: float
) -> None:
    cluster = scenario(name)
    assert cluster.latency_s[first][second] == pytest.approx(delay_ms / 1e3, rel=1e-12)
    assert cluster.bandwidth_bytes_per_s[first][second] == pytest.approx(gbit_per_s * 1e9 / 8, rel=1e-12)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_scenarios_have_64_devices_and_are_symmetric(name: str) -> None:
    cluster: Cluster = scenario(name)
    assert len(cluster.names) == 64
    for matrix in (cluster.latency_s, cluster.bandwidth_bytes_per_s):
        assert tuple(zip(*matrix, strict=True)) == matrix


def test_names_say_the_place_and_the_number() -> None:
    assert scenario("worldwide").names[24] == "Tokyo-24"
    assert scenario("spot").names[31:33] == ("instance7-31", "single0-32")


def test_an_unknown_scenario_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'worldwide'"):
        scenario("world-wide")
