"""Checkpoints: every byte is where the reference loader finds it."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from capstan.errors import InputError
from capstan.hardware.direct_io import BLOCK_BYTES, NUM_REQUESTS
from capstan.storage import Checkpoint

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def _random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bits, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    values = torch.randint(0, 2 if dtype == torch.bool else 256, (num_bytes,), generator=generator)
    return values.to(torch.uint8).view(dtype).reshape(shape)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all examples of a property; each writes its file anew."""
    return tmp_path_factory.mktemp("checkpoint")


tensors = st.builds(
    _random_tensor,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(0, 2**31),
)


@settings(max_examples=100, deadline=None)
@given(
    named=st.dictionaries(st.text("abc.é", min_size=1, max_size=4), tensors, min_size=1, max_size=4),
    data=st.data(),
)
def test_any_range_of_any_tensor_equals_the_reference_loaders(folder, named, data):
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(folder) as checkpoint, safe_open(folder / "model.safetensors", "pt") as reference:
        assert set(checkpoint.tensors) == set(reference.keys())
        for name, entry in checkpoint.tensors.items():
            expected = reference.get_tensor(name)
            assert (entry.name, entry.dtype, entry.shape) == (name, expected.dtype, tuple(expected.shape))
            start = data.draw(st.integers(0, entry.size_bytes))
            end = data.draw(st.integers(start, entry.size_bytes))
            target = torch.full((end - start,), 0xAA, dtype=torch.uint8)
            checkpoint.read(name, target, start=start)
            assert torch.equal(target, _bytes_of(expected)[start:end])


def test_size_bytes_is_that_of_all_tensors(tmp_path):
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).size_bytes == 3 * 5 * 4 + 7


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    entry = checkpoint.tensors[name]
    target = torch.empty(entry.size_bytes, dtype=torch.uint8)
    checkpoint.read(name, target)
    return target.view(entry.dtype).reshape(entry.shape)


def _sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    for file, contents in shards.items():
        save_file(contents, folder / file)
    index = folder / "model.safetensors.index.json"
    weight_map = {name: file for file, contents in shards.items() for name in contents}
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(5.0), "b": torch.arange(4)},
    "model-00002-of-00002.safetensors": {"c": torch.arange(9, dtype=torch.int16).reshape(3, 3)},
}


def test_a_sharded_checkpoint_is_read_shard_by_shard(tmp_path):
    _sharded(tmp_path, SHARDS)
    save_file({"old": torch.zeros(1)}, tmp_path / "model.safetensors")  # the index goes first
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b", "c"}
        for file, contents in SHARDS.items():
            for name, expected in contents.items():
                assert checkpoint.tensors[name].file == tmp_path / file
                assert torch.equal(_read(checkpoint, name), expected)


def test_a_shard_that_the_index_does_not_name_is_not_read(tmp_path):
    _sharded(tmp_path, SHARDS)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"not a checkpoint")
    assert set(Checkpoint(tmp_path).tensors) == {"a", "b", "c"}


def test_the_index_decides_in_which_shard_a_tensor_is(tmp_path):
    index = _sharded(
        tmp_path, {"1.safetensors": {"a": torch.zeros(2)}, "2.safetensors": {"b": torch.ones(2)}}
    )
    save_file({"a": torch.full((2,), 9.0), "b": torch.ones(2)}, tmp_path / "2.safetensors")
    assert json.loads(index.read_text())["weight_map"]["a"] == "1.safetensors"
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(_read(checkpoint, "a"), torch.zeros(2))


def test_missing_shards_are_named(tmp_path):
    _sharded(tmp_path, SHARDS)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks 1 of the 2 shards.*: model-00002-of-00002\.safetensors\."):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "sub/inside.safetensors", "/outside.safetensors", ".", "..", ""]
)
def test_an_index_that_names_what_is_no_file_of_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        save_file({"a": torch.zeros(2)}, path)
    index = {
        "weight_map": {"a": name.replace("/outside", str(tmp_path / "outside")) if name[:1] == "/" else name}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "{}", '{"weight_map": []}', '{"weight_map": null}', "\xff", "[" * 100_000],
    ids=lambda text: text[:20],
)
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is not an index of shards"):
        Checkpoint(tmp_path)


def test_a_folder_without_safetensors_is_refused_and_its_files_are_listed(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"neither.*found: \['config.json', 'pytorch_model.bin'\].*save_pretrained"
    ):
        Checkpoint(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InputError):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("num_elements", [100, 3 << 20], ids=["one request", "several requests"])
def test_a_file_truncated_after_opening_is_an_input_error(tmp_path, num_elements):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(num_elements)}, file)
    with Checkpoint(tmp_path) as checkpoint:
        _read(checkpoint, "a")
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(InputError, match=r"model\.safetensors ends at byte .* truncated"):
            _read(checkpoint, "a")


def test_a_file_removed_after_opening_is_an_input_error(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(InputError):
            _read(checkpoint, "a")


def test_many_shards_take_no_more_threads_than_one(tmp_path):
    sizes = {f"{number}.safetensors": {f"w{number}": torch.zeros(BLOCK_BYTES)} for number in range(4)}
    _sharded(tmp_path, sizes)
    with Checkpoint(tmp_path) as checkpoint:
        for name in checkpoint.tensors:
            _read(checkpoint, name)
        assert 0 < _num_disk_threads() <= NUM_REQUESTS
    assert _num_disk_threads() == 0


def _num_disk_threads() -> int:
    return sum(thread.name.startswith("capstan disk") for thread in threading.enumerate())


def test_a_checkpoint_can_be_read_again_after_it_was_closed(tmp_path):
    save_file({"a": torch.arange(BLOCK_BYTES)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        _read(checkpoint, "a")
    with checkpoint:
        assert torch.equal(_read(checkpoint, "a"), torch.arange(BLOCK_BYTES))


def test_close_closes_every_file(tmp_path):
    _sharded(tmp_path, SHARDS)
    num_open = len(os.listdir("/proc/self/fd"))
    with Checkpoint(tmp_path) as checkpoint:
        for name in checkpoint.tensors:
            _read(checkpoint, name)
        assert len(os.listdir("/proc/self/fd")) == num_open + len(SHARDS)
    assert len(os.listdir("/proc/self/fd")) == num_open
