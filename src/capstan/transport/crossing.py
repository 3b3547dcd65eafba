"""Small tensors between an accelerator and pinned host memory, without a copy engine.

A copy engine takes one copy after the other, so a small one that somebody waits for stands behind large ones
that are done ahead. A kernel reads and writes pinned host memory itself, beside them. It also can be recorded
with the kernels around it.
"""

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def cross(target: Tensor, source: Tensor) -> None:
    """Copy `source` to `target`, both contiguous and of one size and dtype, one of them on an accelerator.

    On the current stream; memory of the host must be pinned, or it is copied the usual way.
    """
    on_host = source if target.is_cuda else target
    if target.is_cuda == source.is_cuda or not (_has_kernel() and on_host.is_pinned()):
        target.copy_(source, non_blocking=True)
        return
    from capstan.transport.crossing_triton import copy

    copy(target, source)


@cache
def _has_kernel() -> bool:
    return find_spec("triton") is not None
