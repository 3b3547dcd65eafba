"""h_D and effective rows: the definitions' own cases and the numbers of the reference experiment."""

import numpy as np
import pytest

from capstan.errors import InputError, UsageError
from capstan.shuffling import advised_buffer, block_variance_factor, effective_rows, look_at
from capstan.storage import NumpyBlocks

from .tables import sorted_table


@pytest.mark.parametrize(("buffer", "rows"), [(50, 87), (10, 16), (5, 8), (1, 1.6)])
def test_effective_rows_of_the_reference_experiment(buffer, rows):
    found = effective_rows(buffer_blocks=buffer, rows_per_block=800, num_blocks=500, h_d=510)
    assert round(found, 1 if rows < 2 else None) == rows


def test_effective_rows_at_the_ends():
    assert effective_rows(buffer_blocks=9, rows_per_block=10, num_blocks=9, h_d=10) == 90
    assert effective_rows(buffer_blocks=1, rows_per_block=10, num_blocks=9, h_d=10) == 1
    assert effective_rows(buffer_blocks=1, rows_per_block=10, num_blocks=1, h_d=1) == 10
    with pytest.raises(UsageError, match="1 to 9 blocks, not 10"):
        effective_rows(buffer_blocks=10, rows_per_block=10, num_blocks=9, h_d=1)


def test_blocks_of_one_sign_have_the_factor_b_and_random_ones_have_1():
    signs = np.repeat([1.0, -1.0], 50)
    blocks = [np.full((8, 1), sign) for sign in signs]
    # With 100 blocks of ± 1 the sample's variance is 100/99 of the population's.
    assert block_variance_factor(blocks) == pytest.approx(8 * 100 / 99)
    rng = np.random.default_rng(0)
    random = [rng.normal(size=(50, 3)) for _ in range(400)]
    # A variance over 400 blocks and 3 columns is known to √(2 / 1200) = 4 %; five times that.
    assert block_variance_factor(random) == pytest.approx(1, abs=0.2)
    assert block_variance_factor([np.ones((3, 1))]) == 1
    assert block_variance_factor([np.ones((3, 1)), np.ones((2, 1))]) == 1


def test_the_advised_buffer_is_the_smallest_that_is_enough():
    how = {"rows_per_block": 800, "num_blocks": 500, "h_d": 510}
    advised = advised_buffer(**how)
    assert effective_rows(buffer_blocks=advised, **how) >= 50
    assert effective_rows(buffer_blocks=advised - 1, **how) < 50
    assert advised_buffer(rows_per_block=800, num_blocks=500, h_d=1) == 1
    assert advised_buffer(rows_per_block=2, num_blocks=3, h_d=2) == 3


def test_sorted_rows_are_told_from_shuffled_ones():
    table = sorted_table(4000)
    shuffled = np.random.default_rng(0).permutation(4000)
    for rows, is_clustered in ((np.arange(4000), True), (shuffled, False)):
        source = NumpyBlocks({name: column[rows] for name, column in table.items()}, rows_per_block=80)
        found = look_at(source, label="y", num_rows=4000, num_blocks=50)
        assert found.model == "softmax"
        assert (found.h_d > 10) == is_clustered
        assert ("not clustered" in found.verdict) != is_clustered
    by_value = np.argsort(table["f0"])
    source = NumpyBlocks({name: column[by_value] for name, column in table.items()}, rows_per_block=80)
    quantity = look_at(source, label="f0", num_rows=4000, num_blocks=50)
    assert quantity.model == "linear"
    assert quantity.h_d > 10


def test_a_label_of_one_value_is_refused():
    source = NumpyBlocks({"a": np.arange(8.0), "y": np.zeros(8)}, rows_per_block=4)
    with pytest.raises(InputError, match="one value in all 2 blocks"):
        look_at(source, label="y", num_rows=8, num_blocks=2)
    with pytest.raises(UsageError, match="'z'"):
        look_at(source, label="z", num_rows=8, num_blocks=2)
