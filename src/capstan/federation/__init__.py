"""Split federated learning: a network cut between devices and a server, sparse activations between them.

    job = SplitJob(parts=…, devices=partition(…), wire=Wire(sparsifier=TopK(keep=0.1)))
    job.run(epochs=5)

Sizes, index codes, packets and sparsifiers import no torch; what trains imports it when it is first named.

Source: Yuan et al., arXiv 2005.05083. See docs/federation.md.
"""

from capstan.federation.packets import CutPacket, read_packet, write_packet
from capstan.federation.sparsifiers import RandomTopK, Threshold, TopK
from capstan.federation.traffic import CutDimensions, DeviceLink, traffic_report
from capstan.federation.wire import Wire

__all__ = [
    "CutDimensions",
    "CutPacket",
    "DeviceLink",
    "RandomTopK",
    "Threshold",
    "TopK",
    "Wire",
    "read_packet",
    "traffic_report",
    "write_packet",
]
