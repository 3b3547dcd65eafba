"""Counting an epoch's IDs before it is trained."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from capstan.recommendation.bags import Bags
from capstan.recommendation.click_log import Samples
from capstan.recommendation.planner import count_workload


def _samples(ids: list[int]) -> Samples:
    bags = {"item": Bags.of(np.array(ids, dtype=np.uint64))}
    return Samples(
        bags=bags, dense=np.empty((len(ids), 0), np.float32), labels=np.zeros(len(ids), np.float32)
    )


@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=8), min_size=1, max_size=12))
def test_ids_are_counted_by_batch_and_in_all(batches):
    counted = count_workload(map(_samples, batches), ["item"])
    assert counted.num_ids == {"item": sum(map(len, batches))}
    assert counted.distinct == {"item": sum(len(set(batch)) for batch in batches)}
    assert counted.rows == {"item": len({each for batch in batches for each in batch})}


def test_an_id_is_sorted_a_few_times_however_many_batches_there_are(monkeypatch):
    sorted_ids = []

    def counting(sort):
        def sort_and_count(*arrays):
            sorted_ids.append(sum(map(len, arrays)))
            return sort(*arrays)

        return sort_and_count

    for name in ("unique", "union1d"):
        monkeypatch.setattr(np, name, counting(getattr(np, name)))
    count_workload((_samples(list(range(start, start + 10))) for start in range(0, 20_000, 10)), ["item"])
    assert sum(sorted_ids) <= 6 * 20_000
