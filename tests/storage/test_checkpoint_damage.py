"""Whatever the bytes of a safetensors file are: it is read in place, or refused with an InputError."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from capstan.errors import InputError
from capstan.storage import Checkpoint

VALID = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.int16)})
DATA = bytes(range(24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all examples of a property; each writes its file anew."""
    return tmp_path_factory.mktemp("checkpoint")


def _folder(folder: Path, content: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(content)
    return folder


def _file(header: Any, data: bytes = DATA, *, length: int | None = None) -> bytes:
    """A safetensors file with this header, as bytes or to be dumped as JSON, in front of `data`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _reads_or_refuses(folder: Path) -> None:
    try:
        checkpoint = Checkpoint(folder)
    except InputError:
        return
    with checkpoint:
        for name, entry in checkpoint.tensors.items():
            checkpoint.read(name, torch.empty(entry.size_bytes, dtype=torch.uint8))


def test_the_valid_file_is_valid(tmp_path):
    assert set(Checkpoint(_folder(tmp_path, VALID)).tensors) == {"a", "b"}
    assert set(Checkpoint(_folder(tmp_path, _file({"a": _entry([2, 3], 0, 24)}))).tensors) == {"a"}


@settings(deadline=None)
@given(position=st.integers(0, len(VALID) - 1))
def test_a_file_truncated_anywhere_is_refused(folder, position):
    with pytest.raises(InputError, match="truncated"):
        Checkpoint(_folder(folder, VALID[:position]))


@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3)
)
def test_changed_bytes_are_read_or_refused(folder, changes):
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    _reads_or_refuses(_folder(folder, bytes(content)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.integers(0, 30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8"]) | json_values,
        "shape": st.lists(st.integers(-1, 9) | st.floats(), max_size=2) | json_values,
        "data_offsets": st.lists(st.integers(-1, 25) | st.floats(), max_size=3) | json_values,
    }
)


@settings(max_examples=150, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=2)
    | json_values
)
def test_any_json_in_the_header_is_read_or_refused(folder, header):
    _reads_or_refuses(_folder(folder, _file(header)))


DAMAGED_HEADERS = {
    "nothing": b"  ",
    "no JSON": b"{'a': 1}",
    "no UTF-8": b'{"\xff": 1}',
    "a list": [],
    "a number": 17,
    "null": b"null",
    "an entry that is a list": {"a": [1, 2]},
    "an entry without dtype": {"a": {"shape": [6], "data_offsets": [0, 24]}},
    "an entry without shape": {"a": {"dtype": "F32", "data_offsets": [0, 24]}},
    "an entry without offsets": {"a": {"dtype": "F32", "shape": [6]}},
    "one offset": {"a": {"dtype": "F32", "shape": [6], "data_offsets": [24]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 12, 24]}},
    "offsets in words": {"a": _entry([6], "none", "all")},
    "a shape in words": {"a": _entry("six", 0, 24)},
    "a nested shape": {"a": _entry([[6]], 0, 24)},
    "an infinite size": b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,24]}}',
    "an infinite offset": b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,1e999]}}',
    "deep nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("header", DAMAGED_HEADERS.values(), ids=DAMAGED_HEADERS)
def test_a_damaged_header_is_refused(tmp_path, header):
    with pytest.raises(InputError, match="damaged"):
        Checkpoint(_folder(tmp_path, _file(header)))


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (_entry([6], 0, 24, "F33"), "dtype F33; known are .*F32"),
        (_entry([6], 0, 24, None), "dtype None"),
        (_entry([5], 0, 24), "needs 20 bytes, its entry claims bytes 0 to 24"),
        (_entry([6], 0, 24, "F16"), "needs 12 bytes"),
        (_entry([6], 24, 0), "bytes 24 to 0"),
        (_entry([6], -24, 0), "bytes -24 to 0"),
        (_entry([-6], 24, 0), "bytes 24 to 0"),
        (_entry([-2, -3], 0, 24), "claims"),
        (_entry([0], -4, -4), "bytes -4 to -4"),
        (_entry([6], 1, 25), "truncated.*ends at byte"),
        (_entry([2**62], 0, 2**64), "truncated"),
    ],
)
def test_an_entry_that_contradicts_itself_or_the_file_is_refused(tmp_path, entry, complaint):
    with pytest.raises(InputError, match=complaint):
        Checkpoint(_folder(tmp_path, _file({"a": entry})))


def _refuses_like_the_reference_loader(folder: Path) -> None:
    with pytest.raises(SafetensorError), safe_open(folder / "model.safetensors", "pt"):
        pass
    with pytest.raises(InputError):
        Checkpoint(folder)


@pytest.mark.parametrize("sizes", [[2.5], [2.0], [True, 2], ["2"], "2"], ids=str)
def test_sizes_that_are_not_integers_are_refused_as_by_the_reference_loader(tmp_path, sizes):
    _refuses_like_the_reference_loader(_folder(tmp_path, _file({"a": _entry(sizes, 0, 8)}, bytes(8))))


@pytest.mark.parametrize("length", [0, 1, 10_000, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length_is_refused(tmp_path, length):
    with pytest.raises(InputError, match="its header claims"):
        Checkpoint(_folder(tmp_path, _file({"a": _entry([6], 0, 24)}, length=length)))


def test_a_header_that_claims_some_of_the_data_is_refused(tmp_path):
    header = json.dumps({"a": _entry([6], 0, 24)}).encode()
    with pytest.raises(InputError, match="damaged"):
        Checkpoint(_folder(tmp_path, _file(header, length=len(header) + 5)))


LAYOUTS = {
    "the same bytes twice": ([("a", 0, 24), ("b", 0, 24)], 24),
    "an overlap": ([("a", 0, 16), ("b", 12, 24)], 24),
    "a hole in front": ([("a", 4, 24)], 24),
    "a hole between": ([("a", 0, 8), ("b", 12, 24)], 24),
    "bytes at the end that belong to nothing": ([("a", 0, 20)], 24),
}


@pytest.mark.parametrize(("tensors", "data_bytes"), LAYOUTS.values(), ids=LAYOUTS)
def test_overlaps_and_holes_are_refused_as_by_the_reference_loader(tmp_path, tensors, data_bytes):
    header = {name: _entry([(end - begin) // 4], begin, end) for name, begin, end in tensors}
    _refuses_like_the_reference_loader(_folder(tmp_path, _file(header, bytes(data_bytes))))


def test_tensors_of_no_bytes_are_accepted_wherever_they_are(tmp_path):
    header = {"a": _entry([0, 3], 0, 0), "b": _entry([6], 0, 24), "c": _entry([2, 0], 24, 24)}
    with Checkpoint(_folder(tmp_path, _file(header))) as checkpoint:
        assert [entry.size_bytes for entry in checkpoint.tensors.values()] == [0, 24, 0]
        checkpoint.read("c", torch.empty(0, dtype=torch.uint8))
