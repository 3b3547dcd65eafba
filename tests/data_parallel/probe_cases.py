"""What ranks do for test_probe.py; started by world.py."""

from typing import Any

from capstan.data_parallel.network_probe import probe_coding, probe_network
from capstan.transport.group import Group


def probed(rank: int, size: int, arguments: Any) -> dict[str, Any]:
    group = Group(patience_s=30)
    network = probe_network(group, size_bytes=2**16)
    coding = probe_coding(group, "group8:512:float32", num_elements=2**14)
    return {"network": [network.latency_s, network.bandwidth_bytes_per_s], "coding": list(coding)}
