"""A batch's IDs as users hold them: KeyedJaggedTensor, Arrow columns, NumPy or torch, into bags by slot.

Nothing here imports torchrec or pyarrow: what an object can do decides what it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capstan.errors import InputError, unknown_name
from capstan.recommendation.bags import Bags


def read_bags(batch: Any, slots: Sequence[str]) -> dict[str, Bags]:
    """Bags of each slot, all of as many samples.

    Args:
        batch: an object with `keys()`, `values()` and `lengths()` or `offsets()`, key after key as in a
            KeyedJaggedTensor; an Arrow table or record batch; or a mapping from slot to `Bags`, to
            (values, offsets), to an Arrow column of integers or lists, or to an array with one ID a sample.

    Raises:
        InputError: a slot is missing, IDs are not IDs, or slots have different numbers of samples.
        UsageError: a slot that nobody declared.
    """
    columns = _columns(batch)
    for name in columns:
        if name not in slots:
            raise unknown_name("slot", name, slots)
    missing = [name for name in slots if name not in columns]
    if missing:
        raise InputError(
            f"The batch has no IDs for slot {missing[0]!r}; it has {', '.join(columns) or 'none'}."
        )
    bags = {name: _bags(columns[name], name) for name in slots}
    sizes = {name: each.num_samples for name, each in bags.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"Every slot needs as many samples, but they have: {told}.")
    return bags


def _columns(batch: Any) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return batch
    if callable(getattr(batch, "keys", None)) and callable(getattr(batch, "values", None)):
        return _keyed_jagged(batch)
    if hasattr(batch, "column_names") and hasattr(batch, "column"):  # an Arrow table
        return {name: batch.column(name) for name in batch.column_names}
    if hasattr(batch, "schema") and hasattr(batch, "column"):  # an Arrow record batch
        return {name: batch.column(name) for name in batch.schema.names}
    raise InputError(
        f"A batch of {type(batch).__name__} cannot be read. Give a KeyedJaggedTensor, an Arrow table, or a "
        "dict from slot to (values, offsets)."
    )


def _keyed_jagged(batch: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    weights = getattr(batch, "weights_or_none", lambda: None)()
    if weights is not None:
        raise InputError("Weights of single IDs are not supported; give a KeyedJaggedTensor without weights.")
    keys, values = list(batch.keys()), np.asarray(batch.values())
    if callable(getattr(batch, "offsets", None)):
        offsets = np.asarray(batch.offsets(), dtype=np.int64)
    else:
        offsets = np.concatenate([[0], np.cumsum(np.asarray(batch.lengths(), dtype=np.int64))])
    num_samples, rest = divmod(len(offsets) - 1, max(1, len(keys)))
    if rest or not keys:
        raise InputError(f"{len(keys)} keys do not divide {len(offsets) - 1} lengths into samples.")
    if (np.diff(offsets) < 0).any() or offsets[0] != 0 or offsets[-1] != len(values):
        raise InputError(
            f"Lengths must be 0 or more and add up to the number of values, {len(values)}, but they add up "
            f"to {offsets[-1] - offsets[0]}."
        )
    parts = {}
    for index, key in enumerate(keys):
        part = offsets[index * num_samples : (index + 1) * num_samples + 1]
        parts[key] = (values[part[0] : part[-1]], part - part[0])
    return parts


def _bags(column: Any, slot: str) -> Bags:
    if isinstance(column, Bags):
        return column
    if isinstance(column, tuple) and len(column) == 2:
        return Bags.of(column[0], column[1], slot=slot)
    if hasattr(column, "combine_chunks"):  # of a chunked Arrow array
        column = column.combine_chunks()
    if hasattr(column, "null_count"):
        return _arrow_bags(column, slot)
    return Bags.of(column, slot=slot)


def _arrow_bags(column: Any, slot: str) -> Bags:
    """An Arrow array; a null, or a null list, is a sample without IDs."""
    if hasattr(column, "flatten") and hasattr(column, "value_lengths"):
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        values = column.flatten()  # leaves out what null lists hide
        if values.null_count:
            raise InputError(
                f"Slot {slot!r} has lists with {values.null_count} nulls in them; take them out."
            )
    else:
        lengths = column.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
        values = column.drop_null()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Bags.of(values.to_numpy(zero_copy_only=False), offsets, slot=slot)
