"""The two ends of a boundary, in one process."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capstan.codecs import codec_from_name
from capstan.errors import InputError, UsageError
from capstan.pipelining import BoundaryEnd, Compression

BATCHES = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=12)


@given(
    batches=BATCHES,
    bits=st.integers(1, 8),
    stochastic=st.booleans(),
    grid=st.sampled_from(["", "symmetric", "midrise"]),
    restart_at=st.integers(0, 12),
    forget_at=st.integers(0, 12),
    seed=st.integers(0, 999),
)
def test_both_ends_hold_the_same_bit_for_bit(batches, bits, stochastic, grid, restart_at, forget_at, seed):
    # In any order, with partial batches, a sample twice in one, a restart and a common forgetting.
    compression = Compression.of_bits(
        forward_bits=max(bits, 2) if grid == "symmetric" else bits,
        backward_bits=None,
        group_size=4,
        symmetric=grid == "symmetric",
        midrise=grid == "midrise",
        stochastic=stochastic,
    )
    sender, receiver = (BoundaryEnd(compression, salt=3) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for index, ids in enumerate(batches):
        if index == restart_at:
            states = sender.state_dict(), receiver.state_dict()
            sender, receiver = (BoundaryEnd(compression, salt=3) for _ in range(2))
            sender.load_state_dict(states[0])
            receiver.load_state_dict(states[1])
        if index == forget_at:
            sender.forget()
            receiver.forget()
            seen.clear()
        values = torch.randn(len(ids), 3, 6, generator=generator) * 10.0 ** (seed % 9 - 4)
        visits = sender.plan(ids)
        assert receiver.plan(ids) == visits
        message = sender.encode(visits, values)
        assert len(message) == receiver.message_bytes(visits, values)
        out = torch.full_like(values, torch.nan)
        receiver.decode(visits, message, out)
        for visit, row, value in zip(visits, out, values, strict=True):
            assert visit.is_first == (visit.sample_id not in seen)
            seen.add(visit.sample_id)
            if visit.is_first:
                assert torch.equal(row, value)
        assert out.isfinite().all()
        for sample_id in seen:
            assert torch.equal(sender.held(sample_id), receiver.held(sample_id))
        assert sender.digest() == receiver.digest()
        assert sender.num_held == receiver.num_held == len(seen)


def test_what_settles_is_held_ever_better_and_what_is_equal_sends_nothing_new():
    compression = Compression.of_bits(forward_bits=3, backward_bits=None)
    sender = BoundaryEnd(compression, salt=0)
    values = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    sender.encode(sender.plan([7]), values)
    sender.encode(sender.plan([7]), values)
    assert torch.equal(sender.held(7), values[0])
    values += torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    errors = []
    for _ in range(6):
        sender.encode(sender.plan([7]), values)
        errors.append(float((sender.held(7) - values[0]).abs().max()))
    # 3 bits: 7 steps between the lowest and the highest, so half a step is at most a seventh of the largest;
    # the grid's numbers are bfloat16, rounded outwards by less than a hundredth; values are float32.
    assert all(after <= before / 6 + 1e-6 for before, after in pairwise(errors))


def test_direct_quantisation_of_the_same_values_never_gets_better():
    compression = Compression.of_bits(forward_bits=3, backward_bits=6, changes=False)
    sender, receiver = (BoundaryEnd(compression, salt=0) for _ in range(2))
    values = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(values)
    errors = set()
    for _ in range(3):
        visits = sender.plan([1, 2])
        receiver.decode(visits, sender.encode(visits, values), out)
        errors.add(float((out - values).abs().max()))
    assert len(errors) == 1
    assert errors.pop() > 0.1
    assert sender.num_held == 0
    receiver.decode_gradients(sender.encode_gradients(values), out)
    # 6 bits: half of a 63rd from lowest to highest, whose bfloat16 are rounded outwards by 2**-7 at most.
    assert float((out - values).abs().max()) <= float(values.abs().max()) / 63 * 1.02


@pytest.mark.parametrize("bits", [0, 9, -2])
def test_bits_without_a_codec_are_refused(bits):
    with pytest.raises(UsageError, match="bit.* Choose"):
        Compression.of_bits(forward_bits=bits, backward_bits=4)
    with pytest.raises(UsageError, match="backward messages"):
        Compression.of_bits(forward_bits=4, backward_bits=bits)


def test_one_bit_has_no_symmetric_grid():
    with pytest.raises(UsageError, match="no symmetric codec of 1 bits for forward"):
        Compression.of_bits(forward_bits=1, backward_bits=4, symmetric=True)
    assert Compression.of_bits(forward_bits=1, backward_bits=4).sends_changes


def test_a_sample_that_never_came_and_a_state_of_other_bits_are_refused():
    changes = BoundaryEnd(Compression.of_bits(forward_bits=2, backward_bits=4), salt=0)
    with pytest.raises(InputError, match="Sample 3 has not crossed this boundary"):
        changes.held(3)
    direct = BoundaryEnd(Compression(forward=codec_from_name("group4")), salt=0)
    with pytest.raises(InputError, match="Go on with the same bits"):
        direct.load_state_dict(changes.state_dict())
