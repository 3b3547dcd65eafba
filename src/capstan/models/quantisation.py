"""Which matrices of a checkpoint are quantised, and how: from config.json and the tensors' names and shapes.

Read are FP8 by blocks, rows or tensors, and integers in groups as compressed-tensors, GPTQ and AWQ write
them. Everything else is refused by its name. What config.json says of activations and of the KV cache is left
out: it makes kernels faster, and here both keep their bits.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capstan.errors import InputError, UnsupportedModel
from capstan.models.quantised_matrices import (
    WORD_BITS,
    ColumnPackedMatrix,
    QuantisedMatrix,
    RowPackedMatrix,
    ScaledMatrix,
)
from capstan.storage import Checkpoint, TensorRange

_PACKED_BITS = (2, 4, 8)  # widths that fill a word; of others, writers differ in what they do at its end
_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What config.json says of quantised weights: the method's name, and what it says of it."""

    method: str
    stated: Mapping[str, Any]
    folder: Path
    key: str  # of config.json

    def refused(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"The weights in {self.folder} are quantised by {self.method!r} ({self.key} in its config.json)"
            + why
        )


def require_known(quantisation: Quantisation) -> None:
    """Raise `UnsupportedModel` for a method that is not read, before its weights are looked for."""
    if quantisation.method not in _FINDERS:
        known = ", ".join(_FINDERS)
        raise quantisation.refused(
            f", which this engine does not read; it reads {known}. Give plain weights; --weight-bits 8 or 4 "
            "quantises them."
        )


def find_matrices(checkpoint: Checkpoint, quantisation: Quantisation) -> list[QuantisedMatrix]:
    """The quantised matrices of a checkpoint; small tensors that say how they are laid out are read.

    Raises:
        UnsupportedModel: the method, or a setting of it, is none that is read.
        InputError: a tensor that belongs to a matrix is missing, or has another shape.
    """
    require_known(quantisation)
    try:
        found = list(_FINDERS[quantisation.method](checkpoint, quantisation))
    except (AttributeError, TypeError, KeyError) as error:
        raise quantisation.refused(
            f" in words that mean nothing: {error!r}. Mend its config.json."
        ) from error
    if not found:
        raise quantisation.refused(
            ", it says, and none of its tensors is. Take that out, or download it again."
        )
    return found


def _fp8(checkpoint: Checkpoint, quantisation: Quantisation) -> Iterator[QuantisedMatrix]:
    stated = quantisation.stated
    _require(quantisation, "expert_dtype", (None, "fp8"))
    block = stated.get("weight_block_size")
    yield from _scaled(checkpoint, _sizes(quantisation, [block] if block else []), _FLOATS)


def _compressed_tensors(checkpoint: Checkpoint, quantisation: Quantisation) -> Iterator[QuantisedMatrix]:
    stated = quantisation.stated
    for part in ("transform_config", "sparsity_config"):
        details = stated.get(part) or {}
        if details and details.get("format") != "dense":
            raise quantisation.refused(f" with a {part}, which this engine does not read.")
    weights = [group.get("weights") or {} for group in (stated.get("config_groups") or {}).values()]
    blocks = [each["block_structure"] for each in weights if each.get("block_structure")]
    blocks += [[1, each["group_size"]] for each in weights if (each.get("group_size") or -1) > 0]
    sizes = _sizes(quantisation, blocks)
    layout = stated.get("format")
    if layout in ("float-quantized", "int-quantized", "naive-quantized"):
        yield from _scaled(checkpoint, sizes, (*_FLOATS, torch.int8))
    elif layout == "pack-quantized":
        bits = next(
            (each for each in _PACKED_BITS if {group.get("num_bits") for group in weights} == {each}), 0
        )
        if not bits:
            raise quantisation.refused(
                ", not all in the same 2, 4 or 8 bits, which this engine does not read."
            )
        yield from _row_packed(checkpoint, sizes, bits)
    else:
        raise quantisation.refused(f" in the format {layout!r}, which this engine does not read.")


def _gptq(checkpoint: Checkpoint, quantisation: Quantisation) -> Iterator[QuantisedMatrix]:
    stated = quantisation.stated
    for setting in ("is_marlin_format", "rotation", "adapter"):
        _require(quantisation, setting, (None, False, {}))
    _require(quantisation, "pack_dtype", (None, "int32"))
    _require(quantisation, "bits", _PACKED_BITS)
    for pattern, changed in (stated.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and changed:
            raise quantisation.refused(
                f" with other settings for {pattern!r}, which this engine does not read."
            )
    key = "checkpoint_format" if "checkpoint_format" in stated else "format"
    _require(quantisation, key, (None, "gptq", "gptq_v2"))
    offset = 0 if stated.get(key) == "gptq_v2" else 1
    yield from _column_packed(checkpoint, quantisation, is_awq=False, zero_offset=offset)


def _awq(checkpoint: Checkpoint, quantisation: Quantisation) -> Iterator[QuantisedMatrix]:
    _require(quantisation, "bits", (4,))
    _require(quantisation, "zero_point", (None, True))
    for key in ("version", "format"):
        _require(quantisation, key, (None, "gemm", "GEMM"))
    yield from _column_packed(checkpoint, quantisation, is_awq=True, zero_offset=0)


_FINDERS: Mapping[str, Callable[[Checkpoint, Quantisation], Iterator[QuantisedMatrix]]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}


def _require(quantisation: Quantisation, setting: str, known: Collection[Any]) -> None:
    found = quantisation.stated.get(setting)
    if found not in known:
        raise quantisation.refused(f" with {setting} {found!r}, which this engine does not read.")


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """How many rows and columns may share a scale."""

    rows: frozenset[int]
    columns: frozenset[int]


def _sizes(quantisation: Quantisation, blocks: list[Any]) -> _Sizes:
    for block in blocks:
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise quantisation.refused(f" in blocks of {block!r}, where rows and columns were wanted.")
    rows, columns = zip(*blocks, strict=True) if blocks else ((), ())
    return _Sizes(rows=frozenset(rows), columns=frozenset(columns))


def _scaled(
    checkpoint: Checkpoint, sizes: _Sizes, dtypes: tuple[torch.dtype, ...]
) -> Iterator[QuantisedMatrix]:
    """Matrices of bytes, each beside its scales: `weight` and `weight_scale_inv` or `weight_scale`."""
    for name, entry in checkpoint.tensors.items():
        if entry.dtype not in dtypes or len(entry.shape) < 2 or name.endswith("_zero_point"):
            continue
        scales = _one_of(checkpoint, name, "_scale_inv", "_scale")
        parts = {"codes": name, "scales": scales.name}
        num_matrices = entry.size_bytes // (entry.shape[-1] * entry.shape[-2])
        shape = scales.shape
        if entry.dtype == torch.int8 and f"{name}_zero_point" in checkpoint.tensors:
            parts["zeros"] = f"{name}_zero_point"
            _check(checkpoint, parts["zeros"], shape)
        grid = _grid_of_scales(shape, num_matrices)
        if grid is None:
            raise _misshapen(checkpoint, scales.name, f"{num_matrices} matrices of shape {entry.shape[-2:]}")
        yield ScaledMatrix(
            name=name,
            shape=entry.shape,
            parts=parts,
            block_rows=_size(checkpoint, scales.name, entry.shape[-2], grid[0], sizes.rows),
            group_size=_size(checkpoint, scales.name, entry.shape[-1], grid[1], sizes.columns),
            num_bits=8 if entry.dtype == torch.int8 else None,
        )


def _grid_of_scales(shape: tuple[int, ...], num_matrices: int) -> tuple[int, int] | None:
    """How many blocks of rows and of columns of each matrix have a scale."""
    count = torch.Size(shape).numel()
    if count == num_matrices:
        return 1, 1
    if len(shape) == 1 and num_matrices == 1:
        return shape[0], 1
    if len(shape) >= 2 and count == num_matrices * shape[-2] * shape[-1]:
        return shape[-2], shape[-1]
    return None


def _row_packed(checkpoint: Checkpoint, sizes: _Sizes, num_bits: int) -> Iterator[QuantisedMatrix]:
    for name, entry in checkpoint.tensors.items():
        if not name.endswith("_packed") or entry.dtype != torch.int32:
            continue
        whole = name.removesuffix("_packed")
        shape = tuple(read_whole(checkpoint, _one_of(checkpoint, whole, "_shape").name).tolist())
        scales = _one_of(checkpoint, whole, "_scale")
        if len(shape) != 2 or entry.shape != (shape[0], -(-shape[1] * num_bits // WORD_BITS)):
            raise _misshapen(checkpoint, name, f"a matrix of shape {list(shape)} in {num_bits} bits")
        groups = scales.shape[-1] if len(scales.shape) == 2 else 1
        if torch.Size(scales.shape).numel() not in (1, shape[0] * groups):
            raise _misshapen(checkpoint, scales.name, f"a matrix of shape {list(shape)}")
        parts = {"codes": name, "scales": scales.name}
        if f"{whole}_zero_point" in checkpoint.tensors:
            parts["zeros"] = f"{whole}_zero_point"
            packed_rows = -(-shape[0] * num_bits // WORD_BITS)
            _check(checkpoint, parts["zeros"], scales.shape, (packed_rows, groups))
        group_size = _size(checkpoint, scales.name, shape[1], groups, sizes.columns)
        parts |= _order(checkpoint, f"{whole}_g_idx", shape[1], group_size)
        yield RowPackedMatrix(
            name=whole,
            shape=shape,
            parts=parts,
            group_size=group_size,
            num_bits=num_bits,
        )


def _column_packed(
    checkpoint: Checkpoint, quantisation: Quantisation, *, is_awq: bool, zero_offset: int
) -> Iterator[QuantisedMatrix]:
    num_bits, size = quantisation.stated["bits"], quantisation.stated.get("group_size", 128)
    if type(size) is not int or size < -1 or size == 0:
        raise quantisation.refused(f" in groups of {size!r}, where a number or -1 for all was wanted.")
    per_word = WORD_BITS // num_bits
    for name, entry in checkpoint.tensors.items():
        if not name.endswith(".qweight") or entry.dtype != torch.int32 or len(entry.shape) != 2:
            continue
        module = name.removesuffix("qweight")
        scales = _one_of(checkpoint, module, "scales")
        zeros = _one_of(checkpoint, module, "qzeros")
        inputs, outputs = entry.shape
        inputs, outputs = (inputs, outputs * per_word) if is_awq else (inputs * per_word, outputs)
        group_size = inputs if size == -1 else size
        groups = -(-inputs // group_size)
        _check(checkpoint, scales.name, (groups, outputs))
        _check(checkpoint, zeros.name, (groups, -(-outputs // per_word)))
        parts = {"codes": name, "scales": scales.name, "zeros": zeros.name}
        parts |= _order(checkpoint, f"{module}g_idx", inputs, group_size)
        yield ColumnPackedMatrix(
            name=f"{module}weight",
            shape=(outputs, inputs),
            parts=parts,
            group_size=group_size,
            num_bits=num_bits,
            is_awq=is_awq,
            zero_offset=zero_offset,
        )


def _order(checkpoint: Checkpoint, name: str, length: int, group_size: int) -> dict[str, str]:
    """The part that says each column's group, where there is one and columns are not simply in order.

    One that was never filled in holds -1.
    """
    if name not in checkpoint.tensors:
        return {}
    _check(checkpoint, name, (length,))
    group_of = read_whole(checkpoint, name)
    if (group_of == -1).any() or torch.equal(group_of.long(), torch.arange(length) // group_size):
        return {}
    if group_of.min() < 0 or group_of.max() >= -(-length // group_size):
        raise InputError(
            f"{name!r} in {checkpoint.folder} names groups that are not there. Download it again."
        )
    return {"group_of": name}


def _one_of(checkpoint: Checkpoint, stem: str, *endings: str) -> TensorRange:
    for ending in endings:
        if stem + ending in checkpoint.tensors:
            return checkpoint.tensors[stem + ending]
    wanted = " or ".join(repr(stem + ending) for ending in endings)
    raise InputError(
        f"{checkpoint.folder} holds quantised codes of {stem!r} and no {wanted}, without which they mean "
        "nothing. Download it again."
    )


def _size(checkpoint: Checkpoint, name: str, length: int, count: int, stated: Collection[int]) -> int:
    """How many of `length` rows or columns share one of `count` scales."""
    if count == 1:
        return length
    fitting = {size for size in stated if -(-length // size) == count} or ({1} if count == length else set())
    if len(fitting) != 1:
        raise _misshapen(checkpoint, name, f"{length} rows or columns in groups of {sorted(stated)}")
    return fitting.pop()


def _check(checkpoint: Checkpoint, name: str, *shapes: tuple[int, ...]) -> None:
    if checkpoint.tensors[name].shape not in shapes:
        raise _misshapen(checkpoint, name, f"one of shape {' or '.join(str(list(each)) for each in shapes)}")


def _misshapen(checkpoint: Checkpoint, name: str, wanted: str) -> InputError:
    return InputError(
        f"{name!r} in {checkpoint.folder} has shape {list(checkpoint.tensors[name].shape)}, which does not "
        f"fit {wanted}. config.json and the weights differ."
    )


def read_whole(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of the checkpoint, as it is stored."""
    entry = checkpoint.tensors[name]
    raw = torch.empty(entry.size_bytes, dtype=torch.uint8)
    checkpoint.read(name, raw)
    return raw.view(entry.dtype).view(entry.shape)
