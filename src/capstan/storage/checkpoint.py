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
from capstan.storage.disk_requests import DiskRequests
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
        self.tensors: Mapping[str, TensorRange] = _all_tensors(folder)
        self._open: dict[Path, FileRanges] = {}
        self._requests = DiskRequests()

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size_bytes for entry in self.tensors.values())

    def read(self, name: str, target: torch.Tensor, *, start: int = 0) -> None:
        """Fill `target` (flat uint8, on the host) with bytes of tensor `name`, from its byte `start` on."""
        entry = self.tensors[name]
        assert start + target.numel() <= entry.size_bytes, f"{name}: range beyond the tensor"
        if entry.file not in self._open:
            self._open[entry.file] = FileRanges(_opened(entry.file), str(entry.file), self._requests)
        self._open[entry.file].read(entry.offset + start, target)

    def close(self) -> None:
        """Close the files."""
        for ranges in self._open.values():
            ranges.close()
        self._open = {}
        self._requests = DiskRequests()  # one that is read again starts anew

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _opened(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"{file} cannot be opened: {error.strerror}. Put it back, or download it."
        ) from error


def _all_tensors(folder: Path) -> dict[str, TensorRange]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed_tensors(index)
    single = folder / "model.safetensors"
    if single.is_file():
        return {entry.name: entry for entry in _header(single)}
    found = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else "no such folder"
    raise InputError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json (found: {found}). "
        "Name a folder in Hugging Face format; convert *.bin files with "
        "transformers' save_pretrained(..., safe_serialization=True)."
    )


def _indexed_tensors(index: Path) -> dict[str, TensorRange]:
    """Every tensor that the index names, from the shard that it names for it."""
    try:
        weight_map = {
            str(name): str(shard) for name, shard in json.loads(index.read_text())["weight_map"].items()
        }
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise InputError(
            f"{index} is not an index of shards: {type(error).__name__}. Download it again."
        ) from error
    shards = sorted(set(weight_map.values()))
    escaping = [shard for shard in shards if shard in ("", ".", "..") or Path(shard).name != shard]
    if escaping:
        raise InputError(f"{index} names shards outside its own folder: {escaping[0]!r}. It is refused.")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise InputError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards that its index names: "
            f"{', '.join(missing[:4])}. Download the missing files."
        )
    found = {(shard, entry.name): entry for shard in shards for entry in _header(index.parent / shard)}
    absent = [name for name, shard in weight_map.items() if (shard, name) not in found]
    if absent:
        raise InputError(
            f"{index} says that {weight_map[absent[0]]} holds {absent[0]!r}, and it does not. "
            "Index and shards do not belong together: download them again."
        )
    return {name: found[shard, name] for name, shard in weight_map.items()}


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
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{file} has a damaged header: {error}. Download it again.") from error
    ranges = [_tensor_range(file, 8 + length, file_bytes, name, entry) for name, entry in entries]
    _require_no_gaps(file, ranges, 8 + length, file_bytes)
    return ranges


def _require_no_gaps(file: Path, ranges: list[TensorRange], data_start: int, file_bytes: int) -> None:
    """The format lays tensors side by side and fills the file: anything else hides bytes or shares them."""
    end = data_start
    for entry in sorted(ranges, key=lambda each: (each.offset, each.size_bytes)):
        if entry.offset != end:
            raise InputError(
                f"{file}: {entry.name!r} begins at byte {entry.offset:,} where the tensor before it ends at "
                f"{end:,}. The file is damaged: download it again."
            )
        end += entry.size_bytes
    if end != file_bytes:
        raise InputError(f"{file} has {file_bytes:,} bytes, its tensors end at {end:,}. Download it again.")


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise TypeError(f"a whole number was wanted, found {number!r}")
    return number


def _tensor_range(file: Path, data_start: int, file_bytes: int, name: str, entry: Any) -> TensorRange:
    try:
        shape = tuple(map(_whole, entry["shape"]))
        begin, end = map(_whole, entry["data_offsets"])
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
