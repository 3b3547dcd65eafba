"""Files as blocks: what is written is read, block by block; what is damaged or changes is refused."""

import json
import os

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from capstan.errors import InputError, UsageError
from capstan.shuffling import open_source

ROWS = 23
RNG = np.random.default_rng(0)
COLUMNS = {
    "a": RNG.normal(size=ROWS),
    "b": RNG.integers(0, 9, ROWS),
    "y": np.array(["no", "yes"])[RNG.integers(0, 2, ROWS)],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSTAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, columns=COLUMNS, rows_per_block=5):
    """A file of these columns, in the format of its suffix."""
    suffix = path.suffix
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=rows_per_block)
    elif suffix == ".arrow":
        table = pa.table(columns)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows_per_block)
    elif suffix == ".npz":
        np.savez(path, **columns)
    elif suffix == ".npy":
        np.save(path, np.rec.fromarrays(list(columns.values()), names=list(columns)))
    elif suffix == ".jsonl":
        rows = [
            dict(zip(columns, row, strict=True)) for row in zip(*map(list, columns.values()), strict=True)
        ]
        path.write_text("\n".join(json.dumps(row, default=lambda value: value.item()) for row in rows) + "\n")
    return path


SUFFIXES = (".parquet", ".arrow", ".npz", ".npy", ".jsonl")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_blocks_together_are_the_file(tmp_path, suffix):
    source = open_source(write(tmp_path / f"rows{suffix}"), rows_per_block=5)
    assert [source.num_rows(block) for block in range(source.num_blocks)] == [5, 5, 5, 5, 3]
    assert source.columns == ("a", "b", "y")
    before = source.file.bytes_read  # the first line, which tells the names
    blocks = [source.read(block) for block in (3, 0, 1, 4, 2)]
    for name, wanted in COLUMNS.items():
        found = np.concatenate([blocks[at][name] for at in (1, 2, 4, 0, 3)])
        assert found.tolist() == wanted.tolist()
    assert source.file.bytes_read - before == sum(source.size_bytes(block) for block in range(5))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_the_columns_that_are_asked_for_are_read(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}")
    source = open_source(path, rows_per_block=5, columns=["y", "a"])
    assert list(source.read(0)) == ["a", "y"]
    assert source.fingerprint != open_source(path, rows_per_block=5).fingerprint
    with pytest.raises(UsageError, match="no column of .* 'c'"):
        open_source(path, columns=["c"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}")
    source = open_source(path, rows_per_block=5)
    source.read(0)
    before = source.fingerprint
    assert open_source(path, rows_per_block=5).fingerprint == before
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(last)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match="changed while it was being read"):
        source.read(1)
    assert open_source(path, rows_per_block=5).fingerprint != before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_remote_file_is_read_through_fsspec(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}")
    url = f"memory://{tmp_path.name}/rows{suffix}"
    with fsspec.open(url, "wb") as file:
        file.write(path.read_bytes())
    source = open_source(url, rows_per_block=5)
    assert source.read(4)["b"].tolist() == COLUMNS["b"][20:].tolist()
    with fsspec.open(url, "wb") as file:
        file.write(path.read_bytes())
    with pytest.raises(InputError, match="changed while"):
        source.read(4)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".npz", ".npy"])
def test_a_file_that_is_cut_short_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}")
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(InputError, match="rows.*cut short"):
        open_source(path)


def test_parquet_whose_data_are_damaged_is_refused_when_the_block_is_read(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": np.arange(1000)}), path, row_group_size=100, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[40:80] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        open_source(path).read(0)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_nulls_are_refused_with_their_column_and_block(tmp_path, suffix):
    columns = {"a": pa.array([1.0, 2.0, None, 4.0]), "b": pa.array([1, 2, 3, 4])}
    path = write(tmp_path / f"rows{suffix}", columns, rows_per_block=2)
    assert open_source(path, columns=["b"]).read(1)["b"].tolist() == [3, 4]
    with pytest.raises(InputError, match="Column 'a' .* has 1 NULLs in block 1"):
        open_source(path).read(1)


def test_small_row_groups_are_joined_and_empty_ones_are_blocks_without_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.table({"a": np.arange(10)})
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, stop in ((0, 2), (2, 2), (2, 3), (3, 9), (9, 10)):
            writer.write_table(table.slice(start, stop - start))
    sizes = open_source(path).sizes
    assert sum(sizes) == 10
    joined = open_source(path, rows_per_block=3)
    assert joined.sizes == (3, 6, 1)
    assert joined.read(0)["a"].tolist() == [0, 1, 2]


def test_lists_of_equal_length_are_a_second_dimension(tmp_path):
    vectors = RNG.normal(size=(6, 3)).astype(np.float32)
    ragged = pa.array([[1.0], [2.0, 3.0]])
    for suffix in (".parquet", ".arrow"):
        path = write(tmp_path / f"v{suffix}", {"v": pa.array(list(vectors))}, rows_per_block=4)
        assert np.array_equal(open_source(path).read(1)["v"], vectors[4:])
        write(path, {"v": ragged})
        with pytest.raises(InputError, match="1 to 2 values"):
            open_source(path).read(0)
    (tmp_path / "v.jsonl").write_text('{"v": [1, 2]}\n{"v": [3, 4]}\n')
    assert open_source(tmp_path / "v.jsonl", rows_per_block=2).read(0)["v"].tolist() == [[1, 2], [3, 4]]


def test_a_table_is_cut_into_500_blocks_or_a_small_one_into_100(tmp_path):
    for rows, blocks, largest in ((7, 7, 1), (1000, 100, 10), (32_000, 500, 64), (100_000, 500, 200)):
        np.save(tmp_path / "a.npy", np.zeros((rows, 1)))
        sizes = open_source(tmp_path / "a.npy").sizes
        assert (len(sizes), max(sizes)) == (blocks, largest)


def test_plain_arrays_have_numbered_columns(tmp_path):
    array = RNG.normal(size=(7, 3))
    np.save(tmp_path / "a.npy", array)
    source = open_source(tmp_path / "a.npy", rows_per_block=4, columns=["0", "2"])
    assert np.array_equal(source.read(1)["2"], array[4:, 2])
    assert source.size_bytes(1) == 3 * 24


def test_libsvm_lines(tmp_path):
    path = tmp_path / "a.libsvm"
    path.write_text("1 1:0.5 4:2 # said\n-1 2:1\n\n+1\n-1 qid:3 3:-1e-2")
    source = open_source(path, rows_per_block=3)
    assert source.sizes == (3, 1)
    rows = source.read(0)
    assert rows["label"].tolist() == [1, -1, 1]
    assert rows["x"].tolist() == [[0, 0.5, 0, 0, 2], [0, 0, 1, 0, 0], [0] * 5]
    assert source.read(1)["x"][0, 3] == np.float32(-0.01)


def test_the_index_of_lines_is_made_once(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "rows.jsonl")
    first = open_source(path)
    (kept,) = (cache / "line-index").iterdir()
    made = []
    monkeypatch.setattr("capstan.shuffling.line_index.line_starts", lambda file: made.append(file))
    assert open_source(path).read(0).keys() == first.read(0).keys()
    assert not made
    kept.write_bytes(b"damaged")
    monkeypatch.undo()
    monkeypatch.setenv("CAPSTAN_CACHE", str(cache))
    assert open_source(path).sizes == first.sizes


def test_lines_without_a_last_break_and_empty_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n\n{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    assert open_source(path, rows_per_block=9).read(0)["a"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}\n{"a": 1', "line 2 .*not JSON"),
        ('{"a": 1}\n{"b": 1}', "line 2 .*'a' is missing"),
        ('{"a": 1}\n{"a": null}', "line 2 .*'a' is null"),
        ('{"a": 1}\n{"a": "x"}', "'a' is a text in some rows"),
        ('{"a": [1]}\n{"a": [1, 2]}', "'a' is not a number, a text or a list"),
        ('{"a": {"b": 1}}', "'a' is not a number"),
        ("[1]", "line 1 .*wanted an object, found list"),
        ("", "has no rows"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path, text, says):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        open_source(path, rows_per_block=9).read(0)


def test_a_line_that_is_not_libsvm_is_named(tmp_path):
    path = tmp_path / "a.svm"
    path.write_text("1 1:2\n1 x:2\n")
    with pytest.raises(InputError, match="line 2 .*wanted `label index:value"):
        open_source(path, rows_per_block=9).read(0)


def test_arrays_that_are_no_rows_are_refused(tmp_path):
    def refused(error, says, name="a.npz"):
        with pytest.raises(error, match=says):
            open_source(tmp_path / name)

    np.savez(tmp_path / "a.npz", a=np.zeros(3), b=np.zeros(4))
    refused(InputError, "different lengths")
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(3))
    refused(InputError, "is compressed")
    np.savez(tmp_path / "a.npz", a=np.asfortranarray(np.zeros((3, 2))))
    refused(InputError, "column by column")
    np.savez(tmp_path / "a.npz", a=np.zeros(()))
    refused(InputError, "single value")
    np.save(tmp_path / "o.npy", np.array([None, {}]), allow_pickle=True)
    refused(InputError, "Python objects", "o.npy")
    np.save(tmp_path / "e.npy", np.zeros((0, 3)))
    refused(InputError, "has no rows", "e.npy")
    refused(InputError, "no file", "nowhere.parquet")
    refused(UsageError, "suffix '.csv'", "a.csv")
    (tmp_path / "folder.parquet").mkdir()
    refused(InputError, "is a folder", "folder.parquet")
    (tmp_path / "text.npy").write_text("no array at all")
    refused(InputError, "cut short or damaged", "text.npy")


def test_blocks_that_are_not_there_are_refused(tmp_path):
    source = open_source(write(tmp_path / "rows.npz"), rows_per_block=5)
    for ask in (source.read, source.num_rows, source.size_bytes):
        with pytest.raises(UsageError, match="blocks 0 to 4; wanted block 5"):
            ask(5)
    with pytest.raises(UsageError, match="at least one row"):
        open_source(tmp_path / "rows.npz", rows_per_block=0)
