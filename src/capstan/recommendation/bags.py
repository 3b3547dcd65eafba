"""The IDs of one slot in one batch: a bag of them for each sample."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from capstan.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Sample b has `ids[offsets[b]:offsets[b + 1]]`, uint64; `offsets` is int64 `[samples + 1]`."""

    ids: np.ndarray
    offsets: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, ids: Any, offsets: Any = None, *, slot: str = "ids") -> "Bags":
        """Checked bags of a NumPy array, tensor or list; without `offsets` every sample has one ID.

        Any unsigned 64-bit number is an ID. Signed integers must not be negative: hashes that use the top
        bit are given as uint64.

        Raises:
            InputError: not integers, negative, or offsets that do not divide the IDs.
        """
        checked = _as_ids(ids, slot)
        if offsets is None:
            return cls(ids=checked, offsets=np.arange(len(checked) + 1, dtype=np.int64))
        ends = np.asarray(offsets)
        if ends.dtype.kind not in "iu" or ends.ndim != 1 or len(ends) == 0:
            raise InputError(
                f"Slot {slot!r}: offsets must be a list of integers, one more than samples, but they are "
                f"{ends.dtype} of shape {ends.shape}."
            )
        ends = np.ascontiguousarray(ends, dtype=np.int64)
        if ends[0] != 0 or ends[-1] != len(checked) or (np.diff(ends) < 0).any():
            raise InputError(
                f"Slot {slot!r}: offsets must rise from 0 to the number of IDs, {len(checked)}, but they go "
                f"from {ends[0]} to {ends[-1]}{'' if (np.diff(ends) >= 0).all() else ' and fall on the way'}."
            )
        return cls(ids=checked, offsets=ends)


def _as_ids(ids: Any, slot: str) -> np.ndarray:
    array = np.asarray(ids)
    if array.size == 0 and array.dtype.kind == "f":  # an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InputError(
            f"Slot {slot!r}: IDs must be a flat array of integers, but they are {array.dtype} of shape "
            f"{array.shape}. Several IDs a sample come as (values, offsets)."
        )
    if array.dtype.kind == "i" and len(array) and array.min() < 0:
        raise InputError(
            f"Slot {slot!r}: ID {array.min()} is negative. IDs are unsigned: if these are hashes of 64 bits, "
            "give them as uint64 (ids.view(numpy.uint64))."
        )
    return np.ascontiguousarray(array).astype(np.uint64, copy=False)
