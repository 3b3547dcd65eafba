"""Made-up clusters: regions anywhere on a globe, with delay and bandwidth by distance."""

import numpy as np

from capstan.errors import UsageError
from capstan.hardware import Cluster
from capstan.hardware.regions import WITHIN_REGION

_EARTH_RADIUS_KM = 6371.0
# Light in fibre, along a way half as long again as the shortest.
_DELAY_S_PER_KM = 1.5 / 200_000
# The measured regions of `capstan.hardware.regions` have about 1.2 Gbit/s nearby, a third at 12,000 km.
_NEARBY_BYTES_PER_S = 1.25e9 / 8
_HALF_RATE_KM = 6000.0


def regions_on_a_globe(num_regions: int, *, devices_per_region: int, seed: int = 0) -> Cluster:
    """Regions drawn uniformly on a sphere, each with equal devices; device names are `region3-17`.

        latency_s = 0.005 + 1.5 distance / 200,000 km/s
        bandwidth = 1.25 Gbit/s / (1 + distance / 6,000 km)

    Inside a region 5 ms and 2 Gbit/s, as between the paper's devices of one region.
    """
    if num_regions < 1 or devices_per_region < 1:
        raise UsageError(
            f"{num_regions} regions of {devices_per_region} devices are no cluster; give at least 1 of each."
        )
    drawn = np.random.default_rng(seed).normal(size=(num_regions, 3))
    points = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    distance_km = _EARTH_RADIUS_KM * np.arccos(np.clip(points @ points.T, -1, 1))
    # The product of two points may differ in the last bit from that of the points exchanged.
    distance_km = (distance_km + distance_km.T) / 2
    latency_s = WITHIN_REGION.latency_s + _DELAY_S_PER_KM * distance_km
    bandwidth = _NEARBY_BYTES_PER_S / (1 + distance_km / _HALF_RATE_KM)
    np.fill_diagonal(latency_s, WITHIN_REGION.latency_s)
    np.fill_diagonal(bandwidth, WITHIN_REGION.bandwidth_bytes_per_s)
    region = np.repeat(np.arange(num_regions), devices_per_region)
    return Cluster(
        names=tuple(f"region{place}-{number}" for number, place in enumerate(region)),
        latency_s=tuple(map(tuple, latency_s[np.ix_(region, region)].tolist())),
        bandwidth_bytes_per_s=tuple(map(tuple, bandwidth[np.ix_(region, region)].tolist())),
    )
