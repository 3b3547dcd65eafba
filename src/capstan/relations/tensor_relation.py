"""A tensor relation: integer keys, each with one tensor, all tensors of one shape and dtype."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from capstan.errors import InputError, UsageError
from capstan.relations.arrays import Array, checked_array, dtype_name, is_torch, library

Key = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RelationType:
    """Which keys there are and what each tensor is like; everything that planning needs to know.

    The keys are a set, not only their bounds, so that sizes stay exact when keys are missing.

    Source: Tensor Relational Algebra, arXiv 2009.00524.
    Names: `bound` is the tensors' shape, `frontier` one more than the greatest key in each component.
    """

    key_arity: int
    keys: frozenset[Key]
    bound: tuple[int, ...]
    dtype: str
    library: str

    @property
    def frontier(self) -> Key:
        return tuple(max((key[at] for key in self.keys), default=-1) + 1 for at in range(self.key_arity))

    @property
    def rank(self) -> int:
        return len(self.bound)

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tensor."""
        itemsize = 1 if self.dtype == "bool" else _itemsize(self.dtype)
        return prod(self.bound) * itemsize

    def __str__(self) -> str:
        keys = " × ".join(map(str, self.frontier)) or "one"
        tile = " × ".join(map(str, self.bound)) or "scalar"
        gaps = "" if len(self.keys) == prod(self.frontier) else f", {len(self.keys)} present"
        return f"keys {keys}{gaps}; tiles {tile} {self.dtype}"


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


@dataclass(frozen=True, eq=False)
class TensorRelation:
    """A function from integer keys to equally shaped tensors."""

    tiles: Mapping[Key, Array]
    type: RelationType

    @staticmethod
    def from_items(items: Iterable[tuple[Key, Any]], *, like: RelationType | None = None) -> "TensorRelation":
        """A relation of (key, tensor) pairs; `like` gives the type of one that has no pairs.

        Raises:
            InputError: a key comes twice, or keys or tensors differ in arity, shape or dtype.
        """
        tiles: dict[Key, Array] = {}
        for key, tensor in items:
            if key in tiles:
                raise InputError(f"The key {key} comes twice; in a tensor relation each key has one tensor.")
            tiles[_checked_key(key)] = checked_array(tensor)
        if not tiles:
            if like is None:
                raise InputError("A tensor relation of no items has no shape; give its type with like=.")
            return TensorRelation({}, _with_keys(like, frozenset()))
        return TensorRelation(MappingProxyType(tiles), _one_type(tiles))

    @staticmethod
    def from_array(array: Any, *, tile: tuple[int, ...]) -> "TensorRelation":
        """Cut an array into equal tiles; the key of a tile is its place along each dimension.

        Raises:
            InputError: a tile size does not divide its dimension, or there is not one size a dimension.
        """
        array = checked_array(array)
        shape = tuple(array.shape)
        if len(tile) != len(shape):
            raise InputError(f"tile={tile} has {len(tile)} sizes, but the array has shape {shape}.")
        for dim, (size, part) in enumerate(zip(shape, tile, strict=True)):
            if part < 1 or size % part:
                raise InputError(
                    f"Tiles of {part} do not divide dimension {dim} of size {size}; "
                    "all tiles of a relation have one shape."
                )
        grid = product(*(range(size // part) for size, part in zip(shape, tile, strict=True)))
        return TensorRelation.from_items(
            (key, array[tuple(slice(at * part, (at + 1) * part) for at, part in zip(key, tile, strict=True))])
            for key in grid
        )

    def to_array(self, *, fill: float | None = None) -> Array:
        """Put the tiles back together: key component d counts tiles along dimension d.

        `fill` stands for missing tiles; without it they are refused.

        Raises:
            UsageError: the keys are no grid over the tensors' dimensions.
            InputError: a tile is missing and `fill` was not given.
        """
        type_ = self.type
        if type_.key_arity != type_.rank:
            raise UsageError(
                f"Keys of {type_.key_arity} components do not place tensors of {type_.rank} dimensions."
            )
        if fill is None:
            self.check_complete()
        shape = [count * size for count, size in zip(type_.frontier, type_.bound, strict=True)]
        whole = self._empty(shape, fill)
        for key, tensor in self.tiles.items():
            place = (slice(at * size, (at + 1) * size) for at, size in zip(key, type_.bound, strict=True))
            whole[tuple(place)] = tensor
        return whole

    def check_complete(self) -> None:
        """Refuse a relation with gaps in its grid of keys.

        Raises:
            InputError: a tile is missing.
        """
        grid = product(*map(range, self.type.frontier))
        missing = next((key for key in grid if key not in self.tiles), None)
        if missing is not None or not self.tiles:
            raise InputError(
                f"The tile {missing} is missing; the relation has {len(self.tiles)} of "
                f"{prod(self.type.frontier)}. Give the value that stands for missing tiles with fill=."
            )

    def _empty(self, shape: list[int], fill: float | None) -> Array:
        value = 0 if fill is None else fill
        if self.type.library == "torch":
            import torch

            dtype = getattr(torch, self.type.dtype)
            device = next((tensor.device for tensor in self.tiles.values()), None)
            return torch.full(shape, value, dtype=dtype, device=device)
        return np.full(shape, value, dtype=self.type.dtype)

    def __repr__(self) -> str:
        return f"TensorRelation({self.type})"


def _with_keys(type_: RelationType, keys: frozenset[Key]) -> RelationType:
    return RelationType(
        key_arity=type_.key_arity, keys=keys, bound=type_.bound, dtype=type_.dtype, library=type_.library
    )


def _checked_key(key: Any) -> Key:
    if not isinstance(key, tuple) or not all(
        isinstance(at, int) and not isinstance(at, bool) and at >= 0 for at in key
    ):
        raise InputError(f"{key!r} is no key; a key is a tuple of integers from 0, as (0, 3).")
    return key


def _one_type(tiles: Mapping[Key, Array]) -> RelationType:
    first_key, first = next(iter(tiles.items()))
    for key, tensor in tiles.items():
        if len(key) != len(first_key):
            raise InputError(f"The keys {first_key} and {key} differ in length.")
        if is_torch(tensor) != is_torch(first) or tensor.dtype != first.dtype:
            raise InputError(
                f"Key {first_key} has {library(first)} {dtype_name(first)}, key {key} "
                f"{library(tensor)} {dtype_name(tensor)}; all tensors of a relation have one type."
            )
        if tuple(tensor.shape) != tuple(first.shape):
            raise InputError(
                f"Key {first_key} has shape {tuple(first.shape)}, key {key} {tuple(tensor.shape)}; "
                "all tensors of a relation have one shape."
            )
    return RelationType(
        key_arity=len(first_key),
        keys=frozenset(tiles),
        bound=tuple(first.shape),
        dtype=dtype_name(first),
        library=library(first),
    )
