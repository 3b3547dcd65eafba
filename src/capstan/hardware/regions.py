"""Networks measured between cloud regions, and the six settings that the DT-FM paper schedules on.

The figures are the constants of the paper's published configuration, symmetric. They stand here as
published, in milliseconds and gigabits each second, and are converted in one place:

    latency_s = delay_ms / 1000
    bandwidth_bytes_per_s = gbit_per_s * 10**9 / 8

Source: DT-FM, Decentralized Training of Foundation Models in Heterogeneous Environments, arXiv 2206.01288.
Differs: nothing. The delays look like round trips, but the paper's cost applies them one way; so do we.
"""

from collections.abc import Callable
from typing import NamedTuple

from capstan.errors import unknown_name
from capstan.hardware.cluster import Cluster
from capstan.hardware.machine import Link

NUM_DEVICES = 64


class Route(NamedTuple):
    """What lies between two devices, in the units in which it was published."""

    delay_ms: float
    gbit_per_s: float

    @property
    def latency_s(self) -> float:
        return self.delay_ms / 1000

    @property
    def bandwidth_bytes_per_s(self) -> float:
        return self.gbit_per_s * 10**9 / 8


class Setting(NamedTuple):
    """Where each of the devices stands, and the route between two of them by their numbers."""

    places: tuple[str, ...]
    route: Callable[[int, int], Route]


REGIONS = (
    "Oregon", "Virginia", "Ohio", "Tokyo", "Seoul", "Singapore", "Sydney", "London", "Frankfurt", "Ireland",
)  # fmt: skip
WORLDWIDE = ("Oregon", "Virginia", "Ohio", "Tokyo", "Seoul", "London", "Frankfurt", "Ireland")
WITHIN_REGION = Route(5, 2)

# One row a region, against the regions that follow it in REGIONS: delay in ms, Gbit/s.
_REGION_ROWS = (
    ((67, 0.79), (49, 1.10), (96, 0.523), (124, 0.46), (163, 0.341), (139, 0.36), (136, 0.42), (143, 0.404),
     (124, 0.482)),
    ((11, 1.12), (143, 0.524), (172, 0.500), (230, 0.364), (197, 0.383), (76, 1.16), (90, 1.02), (67, 1.05)),
    ((130, 0.694), (159, 0.529), (197, 0.452), (185, 0.484), (86, 1.05), (99, 0.799), (77, 1.14)),
    ((34, 1.10), (73, 1.01), (100, 0.761), (210, 0.366), (223, 0.36), (199, 0.465)),
    ((74, 1.14), (148, 0.58), (238, 0.342), (235, 0.358), (228, 0.335)),
    ((92, 0.816), (169, 0.500), (155, 0.535), (179, 0.492)),
    ((262, 0.326), (265, 0.328), (254, 0.344)),
    ((14, 1.14), (12, 1.09)),
    ((24, 1.08),),
)  # fmt: skip

# The regional setting has figures of its own, e.g. 1.15 and not 0.79 Gbit/s from Virginia to Oregon.
_AMERICAN_ROUTES = {
    frozenset(("Virginia", "Oregon")): Route(67, 1.15),
    frozenset(("Virginia", "California")): Route(59, 1.05),
    frozenset(("Virginia", "Ohio")): Route(11, 1.12),
    frozenset(("Oregon", "California")): Route(12, 1.25),
    frozenset(("Oregon", "Ohio")): Route(49, 1.10),
    frozenset(("California", "Ohio")): Route(52, 1.02),
}


def region_route(first: str, second: str) -> Route:
    """What was measured between two regions, or inside one when they are the same."""
    for name in (first, second):
        if name not in REGIONS:
            raise unknown_name("region", name, REGIONS)
    if first == second:
        return WITHIN_REGION
    low, high = sorted((REGIONS.index(first), REGIONS.index(second)))
    return Route(*_REGION_ROWS[low][high - low - 1])


def region_link(source: str, target: str) -> Link:
    """The same as a link in seconds and bytes."""
    route = region_route(source, target)
    return Link(
        source=source,
        target=target,
        bandwidth_bytes_per_s=route.bandwidth_bytes_per_s,
        latency_s=route.latency_s,
    )


def scenario(name: str) -> Cluster:
    """One of the paper's settings of 64 devices; device number n is the n-th name.

    datacenter        8 instances of 8 devices
    spot              8 instances of 4 devices, and 32 machines of 1
    two-universities  32 devices in Ohio, 32 in Virginia
    regional          16 devices in each of four American regions
    worldwide         8 devices in each of eight regions on three continents
    homogeneous       every two devices alike
    """
    if name not in SCENARIOS:
        raise unknown_name("scenario", name, SCENARIOS)
    setting = SCENARIOS[name]()
    numbers = range(NUM_DEVICES)
    routes = [[setting.route(i, j) for j in numbers] for i in numbers]
    return Cluster(
        names=tuple(f"{place}-{number}" for number, place in enumerate(setting.places)),
        latency_s=tuple(tuple(route.latency_s for route in row) for row in routes),
        bandwidth_bytes_per_s=tuple(tuple(route.bandwidth_bytes_per_s for route in row) for row in routes),
    )


def _grouped(places: tuple[str, ...], inside: Route, across: Callable[[str, str], Route]) -> Setting:
    """Devices at the same place see `inside`; others what lies between their places."""

    def route(first: int, second: int) -> Route:
        same = places[first] == places[second]
        return inside if same else across(places[first], places[second])

    return Setting(places, route)


def _datacenter() -> Setting:
    places = tuple(f"instance{number // 8}" for number in range(NUM_DEVICES))
    return _grouped(places, Route(0, 100), lambda first, second: Route(0, 3.125))


def _spot() -> Setting:
    instances = tuple(f"instance{number // 4}" for number in range(32))
    singles = tuple(f"single{number}" for number in range(32))
    return _grouped(instances + singles, Route(0, 100), lambda first, second: Route(0, 1.25))


def _two_universities() -> Setting:
    places = ("Ohio",) * 32 + ("Virginia",) * 32
    return _grouped(places, Route(1, 5), lambda first, second: Route(11, 1.12))


def _regional() -> Setting:
    places = tuple(
        region for region in ("Virginia", "Oregon", "California", "Ohio") for _ in range(NUM_DEVICES // 4)
    )
    return _grouped(places, WITHIN_REGION, lambda first, second: _AMERICAN_ROUTES[frozenset((first, second))])


def _worldwide() -> Setting:
    places = tuple(region for region in WORLDWIDE for _ in range(NUM_DEVICES // len(WORLDWIDE)))
    return _grouped(places, WITHIN_REGION, region_route)


def _homogeneous() -> Setting:
    return Setting(("device",) * NUM_DEVICES, lambda first, second: Route(50, 1))


SCENARIOS: dict[str, Callable[[], Setting]] = {
    "datacenter": _datacenter,
    "spot": _spot,
    "two-universities": _two_universities,
    "regional": _regional,
    "worldwide": _worldwide,
    "homogeneous": _homogeneous,
}
