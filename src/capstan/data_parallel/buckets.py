"""Buckets: parameters that are exchanged together, in flat memory where each has its place."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from capstan.errors import UsageError

BUCKET_BYTES = 10 * 2**20


def cut(sizes: Sequence[int], kinds: Sequence[str], *, bucket_bytes: int) -> list[list[int]]:
    """Positions by bucket, in order: a bucket is closed when it has at least `bucket_bytes`.

    Args:
        sizes: the bytes of each parameter, in the order in which gradients become ready.
        kinds: what can lie in one tensor, such as the element type; a bucket has one kind.
        bucket_bytes: when to close a bucket.
    """
    if bucket_bytes < 1:
        raise UsageError(f"A bucket needs at least a byte, found bucket_bytes={bucket_bytes}.")
    closed: list[list[int]] = []
    open_buckets: dict[str, list[int]] = {}
    for at, kind in enumerate(kinds):
        bucket = open_buckets.setdefault(kind, [])
        bucket.append(at)
        if sum(sizes[each] for each in bucket) >= bucket_bytes:
            closed.append(open_buckets.pop(kind))
    return closed + list(open_buckets.values())


class Bucket:
    """Some parameters of one type and device, and memory for as many numbers.

    Attributes:
        index: its place in the order of exchange, the same on every rank.
        parameters: what it holds.
        flat: one number for each element, parameter after parameter.
        views: `flat` in the parameters' shapes.
        present: which parameters have a gradient on this rank; used: which on any.
    """

    def __init__(self, index: int, parameters: Sequence[Parameter]) -> None:
        self.index = index
        self.parameters = tuple(parameters)
        first = self.parameters[0]
        numel = sum(each.numel() for each in self.parameters)
        self.flat = torch.zeros(numel, dtype=first.dtype, device=first.device)
        self.views = self.views_of(self.flat)
        self.present = [True] * len(self.parameters)
        self.used = list(self.present)

    @property
    def key(self) -> str:
        """Its name, in errors and for what is kept from step to step."""
        return f"bucket {self.index}"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its parameters."""
        return [tuple(each.shape) for each in self.parameters]

    def views_of(self, flat: Tensor) -> list[Tensor]:
        """Memory of the bucket's size, in the parameters' shapes."""
        return split(flat, self.shapes)

    def take_weights(self, out: Tensor | None = None) -> Tensor:
        """The parameters' values, in `flat` or other memory."""
        target = self.flat if out is None else out
        with torch.no_grad():
            for view, parameter in zip(self.views_of(target), self.parameters, strict=True):
                view.copy_(parameter)
        return target

    def put_weights(self, flat: Tensor) -> None:
        """Make these the parameters' values."""
        with torch.no_grad():
            for view, parameter in zip(self.views_of(flat), self.parameters, strict=True):
                parameter.copy_(view)


def split(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of flat memory, one of each shape, one after the other."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    ends = list(itertools.accumulate(sizes))
    return [flat[end - size : end].view(shape) for size, end, shape in zip(sizes, ends, shapes, strict=True)]


def buckets_of(parameters: Sequence[Parameter], *, bucket_bytes: int) -> list[Bucket]:
    """The parameters, in this order, as buckets."""
    sizes = [each.numel() * each.element_size() for each in parameters]
    kinds = [f"{each.dtype} on {each.device}" for each in parameters]
    groups = cut(sizes, kinds, bucket_bytes=bucket_bytes)
    return [Bucket(index, [parameters[at] for at in group]) for index, group in enumerate(groups)]
