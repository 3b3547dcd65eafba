"""Split federated learning: a network cut between devices and a server, sparse activations between them.

    job = SplitJob(network=CutNetwork(bottom=…, top=…, num_classes=10), devices=[DeviceData(…), …])
    job.run_epoch()

Index codes, packets, sparsifiers, sizes and schedules import no torch; what trains imports it, when its name
is first used.

Source: Yuan et al., arXiv 2005.05083. See docs/federation.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from capstan.federation.packets import CutPacket, read_packet, write_packet
from capstan.federation.partition import balanced_batches, partition
from capstan.federation.schedule import ALGORITHMS, Settings
from capstan.federation.sparsifiers import RandomTopK, Threshold, TopK
from capstan.federation.traffic import CutDimensions, DeviceLink, traffic_report
from capstan.federation.wire import Wire

if TYPE_CHECKING:
    from capstan.federation.checkpoint import load_checkpoint, save_checkpoint
    from capstan.federation.job import SplitJob
    from capstan.federation.members import CutNetwork, DeviceData

__all__ = [
    "ALGORITHMS",
    "CutDimensions",
    "CutNetwork",
    "CutPacket",
    "DeviceData",
    "DeviceLink",
    "RandomTopK",
    "Settings",
    "SplitJob",
    "Threshold",
    "TopK",
    "Wire",
    "balanced_batches",
    "load_checkpoint",
    "partition",
    "read_packet",
    "save_checkpoint",
    "traffic_report",
    "write_packet",
]

_WITH_TORCH = {
    "CutNetwork": "members",
    "DeviceData": "members",
    "SplitJob": "job",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
