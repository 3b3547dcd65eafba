"""The PyTorch face: the same batches for every number of ranks and workers, from any step on."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from capstan.errors import InputError, UsageError
from capstan.shuffling import ShuffledDataset, ShuffledLoader, open_source

from . import ranks
from .ranks import ROWS, rows, source


def loader(workers=0, **more):
    how = {"batch_size": 16, "num_streams": 4, "buffer": 0.2, "seed": 3}
    return ShuffledLoader(ShuffledDataset(source(), **how | more), num_workers=workers)


def test_an_epoch_has_each_row_once_as_tensors_and_the_next_is_another():
    shuffled = loader(num_streams=1)
    first = list(shuffled)
    assert len(first) == len(shuffled) == 13
    assert sorted(row for batch in rows(first) for row in batch) == list(range(ROWS))
    for batch in first:
        assert torch.equal(batch["x"][:, 0], 2.0 * batch["row"])
        assert batch["t"].tolist() == [f"r{at}" for at in batch["row"].tolist()]
    assert shuffled.epoch == 1
    assert rows(shuffled) != rows(first)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0)])
def test_ranks_and_workers_do_not_change_a_step(world_size, workers):
    alone = rows(loader())
    ranks = [rows(loader(workers, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    for step, whole in enumerate(alone):
        for rank in range(world_size):
            start = (rank - step * 16) % world_size
            assert ranks[rank][step] == whole[start::world_size]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 7, 13])
def test_a_state_goes_on_anywhere_even_with_other_ranks(workers, stop):
    whole = loader()
    wanted = rows(whole) + rows(whole)
    stopped = loader(workers)
    for step, _ in enumerate(stopped, start=1):
        if step == stop:
            break
    state = stopped.state_dict()
    again = loader(2 - workers)
    again.load_state_dict(state)
    rest = rows(again)
    assert rest == (wanted[stop:13] if stop < 13 else wanted[13:])
    assert rows(again) == wanted[13:] or stop == 13
    for rank in range(2):
        other = loader(rank=rank, world_size=2)
        other.load_state_dict(state)
        assert rows(other) == [batch[rank::2] for batch in rest]


def test_a_loader_that_was_left_goes_on():
    whole, left = rows(loader()), loader()
    for _ in left:
        break
    assert rows(left) == whole[1:]


def test_parquet_is_read_by_workers(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"row": np.arange(100)}), path, row_group_size=5)
    dataset = ShuffledDataset(open_source(path), batch_size=10, num_streams=2)
    assert rows(ShuffledLoader(dataset, num_workers=2)) == rows(ShuffledLoader(dataset))


def test_a_plain_loader_reads_it_without_workers_only():
    dataset = loader().dataset
    assert rows(DataLoader(dataset, batch_size=None)) == rows(loader())
    with pytest.raises(UsageError, match="read by ShuffledLoader"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))


def test_rank_and_world_size_are_those_of_torchs_group(in_world):
    found = in_world(ranks.__file__, "read_as_rank", 2)
    assert found == [[batch[rank::2] for batch in rows(loader())] for rank in range(2)]


def test_streams_are_as_many_as_the_buffer_has_blocks_for():
    assert ShuffledDataset(source(), batch_size=8).share.order.num_streams == 2
    assert ShuffledDataset(source(), batch_size=8, buffer=0.5).share.order.num_streams == 8


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"world_size": 3, "rank": 0}, "num_streams is 4, which 3 readers"),
        ({"rank": 1}, "both rank and world_size"),
        ({"buffer": 0}, "share of the blocks"),
        ({"strategy": "random"}, "no strategy 'random'"),
        ({"workers": 8}, "num_streams is 4, which 8 readers"),
    ],
)
def test_what_cannot_be_shared_is_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        loader(**wrong)


@pytest.mark.parametrize("wrong", [{"seed": 4}, {"num_streams": 2}, {"batch_size": 8}, {"strategy": "block"}])
def test_a_state_of_another_order_is_refused(wrong):
    with pytest.raises(InputError, match=f"another order: its {next(iter(wrong))} is"):
        loader(**wrong).load_state_dict(loader().state_dict())
    with pytest.raises(InputError, match="its format is None"):
        loader().load_state_dict({})
