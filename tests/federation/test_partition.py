"""Which samples lie on which device, and who trains when."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import UsageError
from capstan.federation.partition import SCHEMES, partition
from capstan.federation.schedule import (
    ALGORITHMS,
    Settings,
    epoch_iterations,
    is_lost,
    participants,
    sample_order,
)


@given(
    labels=st.lists(st.integers(0, 4), min_size=24, max_size=80),
    devices=st.integers(1, 8),
    scheme=st.sampled_from(SCHEMES),
    alpha=st.floats(0.01, 100),
    seed=st.integers(0, 99),
)
def test_every_sample_lies_on_exactly_one_device_and_none_is_empty(labels, devices, scheme, alpha, seed):
    parts = partition(np.array(labels), devices, scheme=scheme, alpha=alpha, seed=seed, min_samples=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert min(map(len, parts)) >= 3
    again = partition(np.array(labels), devices, scheme=scheme, alpha=alpha, seed=seed, min_samples=3)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_labels_are_even_sorted_or_skewed():
    labels = np.arange(1000) % 10

    def largest_share(scheme, alpha=0.5):
        parts = partition(labels, 10, scheme=scheme, alpha=alpha, seed=1)
        return np.mean([np.bincount(labels[part], minlength=10).max() / len(part) for part in parts])

    assert largest_share("labels") == 1
    assert largest_share("iid") < largest_share("dirichlet", 0.5) < largest_share("dirichlet", 0.05)
    assert largest_share("dirichlet", 1000) < 0.2


def test_partitions_that_cannot_be_are_refused():
    for wrong, said in (
        ({"num_devices": 4}, "do not give"),
        ({"num_devices": 0}, "do not give"),
        ({"num_devices": 2, "scheme": "even"}, "partition"),
        ({"num_devices": 2, "scheme": "dirichlet", "alpha": 0}, "alpha"),
    ):
        with pytest.raises(UsageError, match=said):
            partition(np.zeros(3, int), **wrong)


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    batch=st.integers(1, 7),
    algorithm=st.sampled_from(ALGORITHMS),
    fraction=st.floats(0.1, 1),
    every=st.sampled_from([1, 2, None]),
)
def test_an_epoch_has_every_sample_of_its_devices_once_and_ends_averaged(
    sizes, batch, algorithm, fraction, every
):
    settings = Settings(algorithm=algorithm, fraction_train=fraction, average_every=every, seed=4)
    iterations = list(epoch_iterations(sizes, [batch] * len(sizes), settings, 3))
    devices = participants(sizes, settings, 3)
    seen = {device: [] for device in devices}
    waiting = set()
    for iteration in iterations:
        for number, rows, start in iteration.batches:
            order = sample_order(settings, 3, number, sizes[number])
            assert order[start : start + len(rows)].tolist() == rows.tolist()
            assert 1 <= len(rows) <= batch
            seen[number] += rows.tolist()
            waiting.add(number)
        waiting -= set(iteration.averaged)
    assert all(sorted(rows) == list(range(sizes[device])) for device, rows in seen.items())
    assert not waiting


def test_losses_come_as_often_as_asked():
    settings = Settings(loss_rate=0.1, quorum=0.5)
    lost = [
        is_lost(settings, epoch, number, device)
        for epoch in range(5)
        for number in range(40)
        for device in range(10)
    ]
    # 2000 draws of probability 0.1: a deviation of 0.0067; four of them.
    assert np.mean(lost) == pytest.approx(0.1, abs=0.027)
    assert not any(is_lost(Settings(), 0, number, 0) for number in range(100))
