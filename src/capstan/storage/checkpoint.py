"""A safetensors checkpoint, read in place.

Tensors are located from the headers and read by byte range into memory that the caller owns: no second
copy of the model is made, on disk or in memory.

Source: the safetensors format (8 bytes little-endian header length, JSON header, data), and the
`model.safetensors.index.json` of sharded checkpoints.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch

from capstan.errors import InputError
from capstan.storage.file_ranges import FileRanges

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class TensorRange:
    """Where one tensor lies: `size_bytes` bytes at `offset` of `file`."""

    name: str
    file: Path
    offset: int
    size_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder with `model.safetensors` or a sharded checkpoint.

    Raises:
        InputError: no safetensors file, a missing shard, a truncated or malformed file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: Mapping[str, TensorRange] = {
            entry.name: entry for file in _shards(folder) for entry in _header(file)
        }
        self._open: dict[Path, FileRanges] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size_bytes for entry in self.tensors.values())

    def read(self, name: str, target: torch.Tensor, *, start: int = 0) -> None:
        """Fill `target` (flat uint8, on the host) with bytes of tensor `name`, from its byte `start` on."""
        entry = self.tensors[name]
        assert start + target.numel() <= entry.size_bytes, f"{name}: range beyond the tensor"
        if entry.file not in self._open:
            self._open[entry.file] = FileRanges(os.open(entry.file, os.O_RDONLY), str(entry.file))
        self._open[entry.file].read(entry.offset + start, target)

    def close(self) -> None:
        """Close the files."""
        for ranges in self._open.values():
            ranges.close()
        self._open = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed_shards(index)
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    found = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else "no such folder"
    raise InputError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json (found: {found}). "
        "Name a folder in Hugging Face format; convert *.bin files with "
        "transformers' save_pretrained(..., safe_serialization=True)."
    )


def _indexed_shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is not an index of shards: {error!r}. Download it again.") from error
    escaping = [name for name in names if Path(name).name != name]
    if escaping:
        raise InputError(f"{index} names shards outside its own folder: {escaping[0]!r}. It is refused.")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise InputError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} shards that its index names: "
            f"{', '.join(missing[:4])}. Download the missing files."
        )
    return [index.parent / name for name in names]


def _header(file: Path) -> list[TensorRange]:
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise InputError(
                f"{file} is not a safetensors file or is truncated: its header claims {length:,} bytes, "
                f"the file has {file_bytes:,}. Download it again."
            )
        try:
            header = json.loads(stream.read(length))
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file} has a damaged header: {error}. Download it again.") from error
    return [_tensor_range(file, 8 + length, file_bytes, name, entry) for name, entry in entries]


def _tensor_range(file: Path, data_start: int, file_bytes: int, name: str, entry: Any) -> TensorRange:
    try:
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        dtype_name = str(entry["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: the header's entry for {name!r} is damaged: {error!r}.") from error
    if dtype_name not in _DTYPES:
        raise InputError(f"{file}: {name!r} has dtype {dtype_name}; known are {', '.join(_DTYPES)}.")
    dtype = _DTYPES[dtype_name]
    if begin < 0 or min(shape, default=0) < 0 or end - begin != prod(shape) * dtype.itemsize:
        raise InputError(
            f"{file}: {name!r} of shape {list(shape)} and dtype {dtype_name} needs "
            f"{prod(shape) * dtype.itemsize:,} bytes, its entry claims bytes {begin:,} to {end:,}."
        )
    if data_start + end > file_bytes:
        raise InputError(
            f"{file} is truncated: {name!r} ends at byte {data_start + end:,}, the file has {file_bytes:,}. "
            "Download it again."
        )
    return TensorRange(
        name=name,
        file=file,
        offset=data_start + begin,
        size_bytes=end - begin,
        dtype=dtype,
        shape=shape,
    )
