"""storage: where do bytes rest?

A `Checkpoint` reads tensors of a safetensors folder in place, by byte range. A `Slab` is memory of an
exact size on a device or on the host (pinned where that helps). A `DiskSlab` is scratch space in a file.
`write_atomically` and `open_atomically` make files that are there whole or not at all, an `AppendLog` is a
file that only grows, a `BlockSource` gives rows block by block.

What holds tensors imports torch, when its name is first used; the rest does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from capstan.storage.append_log import AppendLog
from capstan.storage.atomic import open_atomically, write_atomically
from capstan.storage.blocks import BlockSource, NumpyBlocks, Rows

if TYPE_CHECKING:
    from capstan.storage.checkpoint import Checkpoint, TensorRange
    from capstan.storage.disk_slab import DiskSlab
    from capstan.storage.slab import Slab
    from capstan.storage.slab_keeper import SlabKeeper

__all__ = [
    "AppendLog",
    "BlockSource",
    "Checkpoint",
    "DiskSlab",
    "NumpyBlocks",
    "Rows",
    "Slab",
    "SlabKeeper",
    "TensorRange",
    "open_atomically",
    "write_atomically",
]

_WITH_TORCH = {
    "Checkpoint": "checkpoint",
    "TensorRange": "checkpoint",
    "DiskSlab": "disk_slab",
    "Slab": "slab",
    "SlabKeeper": "slab_keeper",
}


def __getattr__(name: str) -> object:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
