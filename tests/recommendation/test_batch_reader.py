"""A batch as KeyedJaggedTensor, Arrow, NumPy or torch becomes the same bags; what is not a batch is named."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from capstan.errors import InputError, UsageError
from capstan.recommendation import read_bags


class Jagged:
    """What torchrec's KeyedJaggedTensor offers to a reader."""

    def __init__(self, keys, values, lengths=None, offsets=None, weights=None):
        self._parts = keys, torch.tensor(values), weights
        if lengths is not None:
            self.lengths = lambda: torch.tensor(lengths)
        if offsets is not None:
            self.offsets = lambda: torch.tensor(offsets)

    def keys(self):
        return self._parts[0]

    def values(self):
        return self._parts[1]

    def weights_or_none(self):
        return self._parts[2]


A, B = [[1, 2], [], [3]], [[4], [5, 5], []]
LISTS = {"a": pa.array(A), "b": pa.array(B)}
BATCHES = {
    "jagged with lengths": Jagged(["a", "b"], [1, 2, 3, 4, 5, 5], lengths=[2, 0, 1, 1, 2, 0]),
    "jagged with offsets": Jagged(["b", "a"], [4, 5, 5, 1, 2, 3], offsets=[0, 1, 3, 3, 5, 5, 6]),
    "arrow table": pa.table(LISTS),
    "arrow record batch": pa.record_batch(LISTS),
    "arrow of several chunks": pa.concat_tables([pa.table(LISTS).slice(0, 1), pa.table(LISTS).slice(1)]),
    "arrow with null lists": pa.table(
        {"a": pa.array([[1, 2], None, [3]]), "b": pa.array([[4], [5, 5], None])}
    ),
    "arrow cut out": pa.table(
        {name: pa.array([[9], *each, [9]]) for name, each in (("a", A), ("b", B))}
    ).slice(1, 3),
    "large lists": pa.table(
        {"a": pa.array(A, pa.large_list(pa.uint64())), "b": pa.array(B, pa.list_(pa.int32()))}
    ),
    "numpy": {"a": (np.array([1, 2, 3]), [0, 2, 2, 3]), "b": (np.array([4, 5, 5]), np.array([0, 1, 3, 3]))},
    "torch": {
        "a": (torch.tensor([1, 2, 3]), torch.tensor([0, 2, 2, 3])),
        "b": (torch.tensor([4, 5, 5]), torch.tensor([0, 1, 3, 3])),
    },
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=list(BATCHES))
def test_every_form_of_a_batch_gives_the_same_bags(batch):
    bags = read_bags(batch, ["a", "b"])
    assert bags["a"].ids.tolist() == [1, 2, 3]
    assert bags["a"].offsets.tolist() == [0, 2, 2, 3]
    assert bags["b"].ids.tolist() == [4, 5, 5]
    assert bags["b"].offsets.tolist() == [0, 1, 3, 3]
    assert {each.ids.dtype for each in bags.values()} == {np.dtype(np.uint64)}


@pytest.mark.parametrize("column", [np.array([7, 8]), torch.tensor([7, 8]), [7, 8], pa.array([7, 8])])
def test_one_id_a_sample_needs_no_offsets(column):
    bags = read_bags({"a": column}, ["a"])["a"]
    assert bags.ids.tolist() == [7, 8]
    assert bags.offsets.tolist() == [0, 1, 2]


def test_a_null_is_a_sample_without_ids():
    assert read_bags({"a": pa.array([7, None, 9])}, ["a"])["a"].offsets.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"a": [1], "c": [1]}, UsageError, "no slot 'c'"),
        ({"b": [1]}, InputError, "no IDs for slot 'a'; it has b"),
        ({"a": [1], "b": [1, 2]}, InputError, "a 1, b 2"),
        ({"a": [-1], "b": [1]}, InputError, "'a': ID -1 is negative"),
        ({"a": pa.array([[1, None]]), "b": [1]}, InputError, "'a' has lists with 1 nulls"),
        ({"a": pa.array(["x"]), "b": [1]}, InputError, "flat array of integers"),
        (Jagged(["a", "b"], [1, 2], lengths=[1, 1], weights=[1.0, 2.0]), InputError, "Weights"),
        (Jagged(["a", "b"], [1, 2], lengths=[1, 0, 1]), InputError, "2 keys do not divide 3"),
        (Jagged(["a", "b"], [1, 2], lengths=[1, 2]), InputError, "add up"),
        (Jagged(["a", "b"], [1, 2], lengths=[3, -1]), InputError, "0 or more"),
        ([1, 2], InputError, "A batch of list cannot be read"),
    ],
)
def test_what_is_not_a_batch_of_these_slots_is_named(batch, error, message):
    with pytest.raises(error, match=message):
        read_bags(batch, ["a", "b"])
