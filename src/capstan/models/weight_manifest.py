"""The tensors of a model as they rest and travel: codec, bytes at rest, bytes when decoded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from capstan.codecs import Cast, Codec, GroupQuantised, Identity
from capstan.errors import UsageError
from capstan.models.checkpoint_map import Sources
from capstan.models.decoded_checkpoint import DecodedCheckpoint
from capstan.models.meta_model import MetaModel, TensorSpec
from capstan.storage import Checkpoint

GROUP_SIZE = 64
_BITS = (16, 8, 4)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as it rests: values of `dtype` (the checkpoint's) encoded by `codec`.

    Where the checkpoint is quantised, its values are decoded while they are read (`is_decoded`), or its codes
    become records of `codec` as they are (`keeps_grid`).
    """

    spec: TensorSpec
    dtype: torch.dtype
    codec: Codec
    device_type: str
    is_decoded: bool = False
    keeps_grid: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def stored_bytes(self) -> int:
        return self.codec.encoded_bytes(self.spec.shape, self.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether the stored bytes are the very values the model computes with."""
        return isinstance(self.codec, Identity) and self.dtype == self.spec.dtype

    @property
    def is_as_in_checkpoint(self) -> bool:
        """Whether the stored bytes are the checkpoint's own."""
        return isinstance(self.codec, Identity) and not self.is_decoded

    @cached_property
    def computed_bytes(self) -> int:
        """Bytes of the values that the model computes with."""
        return self.spec.num_elements * self.spec.dtype.itemsize

    @property
    def decoded_bytes(self) -> int:
        """Bytes that decoding it needs apart from the stored ones; none if it is used as it is stored."""
        return 0 if self.is_plain else self.computed_bytes

    @cached_property
    def scratch_bytes(self) -> int:
        """Temporary bytes while it is decoded on the device."""
        return decoding_scratch_bytes(
            self.codec, self.spec.shape, self.dtype, self.spec.dtype, device_type=self.device_type
        )


def decoding_scratch_bytes(
    codec: Codec, shape: tuple[int, ...], dtype: torch.dtype, target: torch.dtype, *, device_type: str
) -> int:
    """Temporary bytes of decoding values of `dtype` into memory of `target`, from a slab's aligned piece.

    Elements that are only widened, or not changed at all, are copied straight to their place.
    """
    resting = codec.dtype if isinstance(codec, Cast) else dtype
    if isinstance(codec, (Identity, Cast)) and torch.promote_types(resting, target) == target:
        return 0
    return codec.scratch_bytes(shape, dtype, device_type=device_type)


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """All tensors by role. `units[i]` is what layer i needs; the last unit is the head.

    A part of a model has some of its layers, the first of them being layer `first_layer`; its last unit is
    empty where the head is elsewhere, and `holds_table` says whether the input embedding is here.
    """

    units: tuple[tuple[StoredTensor, ...], ...]
    table: StoredTensor
    rest: tuple[StoredTensor, ...]
    first_layer: int = 0
    holds_table: bool = True

    @property
    def head(self) -> StoredTensor | None:
        """The output matrix, if it is here."""
        return self.units[-1][0] if self.units[-1] else None

    def part(self, first: int, end: int) -> "WeightManifest":
        """Layers `first` up to, not including, `end`; the ends with table and head."""
        head = self.units[-1] if end == self.num_layers else ()
        units = (*self.units[first:end], head)
        return replace(self, units=units, first_layer=first, holds_table=first == 0)

    @property
    def num_layers(self) -> int:
        return len(self.units) - 1

    @cached_property
    def placeable(self) -> Mapping[str, StoredTensor]:
        """Every tensor that has a place of its own, in the order in which a sweep needs them."""
        table = [self.table] if self.holds_table else []
        ordered = [*table, *(tensor for unit in self.units for tensor in unit)]
        return {tensor.name: tensor for tensor in ordered}

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all tensors at rest."""
        return sum(tensor.stored_bytes for tensor in (*self.placeable.values(), *self.rest))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the input embedding at rest; none where it is elsewhere."""
        return self.table.stored_bytes // self.table.spec.shape[0] if self.holds_table else 0


def list_weights(
    meta: MetaModel,
    checkpoint: Checkpoint,
    sources: Sources,
    *,
    weight_bits: int | None,
    device_type: str,
) -> WeightManifest:
    """Decide how every tensor rests.

    `weight_bits` 4 or 8 quantises the matrices of the decoder layers, in groups of 64 along their inputs;
    embeddings, output matrix, vectors and matrices with a side below 64 stay as they are, as is usual for
    weight-only quantisation. 16 stores wider checkpoints in 16 bits. None keeps the checkpoint's bits.
    Integers that a quantised checkpoint has in no more bits than that are kept as they are.

    Differs: FlexGen also quantises the embeddings, which costs accuracy and saves little.
    """
    if weight_bits is not None and weight_bits not in _BITS:
        raise UsageError(f"Weights are stored in {', '.join(map(str, _BITS))} bits, not in {weight_bits}.")

    def stored(spec: TensorSpec, *, in_layer: bool, is_placed: bool = True) -> StoredTensor:
        names = [piece.source for piece in sources[spec.name]]
        dtype = checkpoint.tensors[names[0]].dtype
        decoded = checkpoint if isinstance(checkpoint, DecodedCheckpoint) else None
        grid = decoded.grid_of(names) if decoded else None
        keeps_grid = grid is not None and is_placed and grid.num_bits <= (weight_bits or grid.num_bits)
        codec = grid if grid is not None and keeps_grid else _codec(spec, dtype, weight_bits, in_layer)
        return StoredTensor(
            spec=spec,
            dtype=dtype,
            codec=codec,
            device_type=device_type,
            is_decoded=decoded is not None and not decoded.matrices.keys().isdisjoint(names),
            keeps_grid=keeps_grid,
        )

    layers = [
        tuple(stored(spec, in_layer=True) for spec in meta.layer_tensors(index))
        for index in range(meta.num_layers)
    ]
    head = stored(meta.state[meta.head], in_layer=False)
    table = stored(meta.state[meta.table], in_layer=False)
    rest = tuple(stored(spec, in_layer=False, is_placed=False) for spec in meta.rest)
    return WeightManifest(units=(*layers, (head,)), table=table, rest=rest)


def _codec(spec: TensorSpec, dtype: torch.dtype, bits: int | None, in_layer: bool) -> Codec:
    if bits is None or not dtype.is_floating_point:
        return Identity()
    is_matrix = len(spec.shape) >= 2 and min(spec.shape[-2:]) >= GROUP_SIZE
    if bits in (4, 8) and in_layer and is_matrix:
        return GroupQuantised(num_bits=bits, group_size=GROUP_SIZE, scale_dtype=torch.float16)
    return Cast(dtype=torch.float16) if dtype.itemsize > 2 and len(spec.shape) >= 2 else Identity()
