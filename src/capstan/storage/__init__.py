"""storage: where do bytes rest?

A `Checkpoint` reads tensors of a safetensors folder in place, by byte range. A `Slab` is memory of an
exact size on a device or on the host (pinned where that helps). A `DiskSlab` is scratch space in a file.
"""

from capstan.storage.checkpoint import Checkpoint, TensorRange
from capstan.storage.disk_slab import DiskSlab
from capstan.storage.slab import Slab
from capstan.storage.slab_keeper import SlabKeeper

__all__ = ["Checkpoint", "DiskSlab", "Slab", "SlabKeeper", "TensorRange"]
