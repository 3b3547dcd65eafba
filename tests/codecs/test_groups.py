"""Group quantisation: every promise of its docstring."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from capstan.codecs import GroupQuantised
from capstan.codecs.bits import unpack
from capstan.codecs.groups import SCALE_DTYPES
from capstan.errors import InputError, UsageError

quantisers = st.builds(
    GroupQuantised,
    num_bits=st.integers(2, 8),
    group_size=st.integers(1, 9),
    symmetric=st.booleans(),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
)
nearest_quantisers = st.builds(
    GroupQuantised,
    num_bits=st.integers(2, 8),
    group_size=st.integers(1, 9),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
)


def _singles(limit: float) -> st.SearchStrategy[list[float]]:
    one = st.floats(-limit, limit, width=32)
    near = st.tuples(one, st.lists(st.floats(-(2.0**-10), 2.0**-10, width=32), min_size=1, max_size=19))
    return st.lists(one, min_size=1, max_size=20) | near.map(
        lambda pair: [pair[0] * (1 + x) for x in pair[1]]
    )


class Records(NamedTuple):
    """The payload, taken apart by its description: codes (groups, group_size), numbers (groups, 1)."""

    codes: torch.Tensor
    low: torch.Tensor
    step: torch.Tensor


def _records(codec: GroupQuantised, payload: torch.Tensor) -> Records:
    rows = payload.view(-1, codec.group_bytes)
    code_bytes = math.ceil(codec.group_size * codec.num_bits / 8)
    numbers = rows[:, code_bytes:].flatten().clone().view(codec.scale_dtype).view(len(rows), -1).double()
    codes = unpack(rows[:, :code_bytes], codec.group_size, codec.num_bits)
    low = torch.zeros_like(numbers) if codec.symmetric else numbers[:, :1]
    return Records(codes, low, numbers[:, -1:])


def _filled(codec: GroupQuantised, values: torch.Tensor) -> torch.Tensor:
    """A single row as (groups, group_size) in float64."""
    missing = -len(values) % codec.group_size
    return torch.cat((values, values[-1:].expand(missing))).view(-1, codec.group_size).double()


def _bounds(codec: GroupQuantised, records: Records, values: torch.Tensor) -> torch.Tensor:
    slack = 2.0**-21 * (records.low.abs() + (2**codec.num_bits - 1) * records.step)
    error = records.step / 2 if codec.rounding == "nearest" else records.step
    return (error + slack).expand(-1, codec.group_size).reshape(-1)[: len(values)]


@settings(max_examples=200, deadline=None)
@given(quantisers, st.data())
def test_error_is_at_most_half_a_step_or_a_step_plus_slack(codec, data):
    values = torch.tensor(data.draw(_singles(60000.0)))
    packet = codec.encode(values, seed=data.draw(st.integers(0, 99)))
    bounds = _bounds(codec, _records(codec, packet.payload), values)
    assert ((codec.decode(packet).double() - values.double()).abs() <= bounds).all()


@settings(max_examples=100, deadline=None)
@given(nearest_quantisers, st.data())
def test_codes_and_decoded_values_follow_the_formulas(codec, data):
    values = torch.tensor(data.draw(_singles(60000.0)))
    packet = codec.encode(values)
    codes, low, step = (part.float() for part in _records(codec, packet.payload))
    lowest = 1 - 2 ** (codec.num_bits - 1) if codec.symmetric else 0
    positions = (_filled(codec, values).float() - low) / step.masked_fill(step == 0, 1)
    highest = -lowest if codec.symmetric else 2**codec.num_bits - 1
    assert torch.equal(codes + lowest, positions.round().clamp(lowest, highest))
    decoded = low + (codes + lowest) * step
    assert torch.equal(codec.decode(packet), decoded.view(-1)[: len(values)])


@settings(deadline=None)
@given(nearest_quantisers, st.data())
def test_records_of_known_codes_and_numbers_are_those_of_the_payload(codec, data):
    length = data.draw(st.integers(1, 4)) * codec.group_size
    payload = codec.encode(torch.randn(3, length)).payload
    found = _records(codec, payload)
    parts = [found.step] if codec.symmetric else [found.low, found.step]
    assert torch.equal(codec.records(found.codes, torch.cat(parts, 1).to(codec.scale_dtype)), payload)


@settings(max_examples=150, deadline=None)
@given(quantisers, st.data())
def test_error_bound_holds_down_to_the_smallest_and_up_to_the_largest_ranges(codec, data):
    limit = min(torch.finfo(codec.scale_dtype).max, 2.0**126)
    scale = 2.0 ** data.draw(st.integers(-149, 126))
    values = torch.tensor(data.draw(_singles(1.0))).mul(scale).clamp(-limit, limit)
    packet = codec.encode(values, seed=1)
    bounds = _bounds(codec, _records(codec, packet.payload), values)
    assert ((codec.decode(packet).double() - values.double()).abs() <= bounds).all()


@settings(max_examples=200, deadline=None)
@given(quantisers, st.data())
def test_the_stored_grid_covers_the_group(codec, data):
    values = torch.tensor(data.draw(_singles(60000.0)))
    records, groups = _records(codec, codec.encode(values, seed=1).payload), _filled(codec, values)
    levels = 2 ** (codec.num_bits - 1) - 1 if codec.symmetric else 2**codec.num_bits - 1
    low = -levels * records.step if codec.symmetric else records.low
    high = records.low + levels * records.step
    # One rounding in float32 of the range, one of step times levels.
    assert (low <= groups).all() or codec.symmetric
    assert (low - groups <= 2.0**-22 * low.abs()).all()
    assert (groups - high <= 2.0**-22 * (levels * records.step)).all()


@settings(max_examples=100, deadline=None)
@given(quantisers, st.integers(1, 20), st.floats(-60000, 60000, width=16))
def test_a_constant_group_decodes_exactly_where_representable(codec, length, value):
    codec = GroupQuantised(num_bits=codec.num_bits, group_size=codec.group_size, rounding=codec.rounding)
    values = torch.full((length,), value)
    assert torch.equal(codec.decode(codec.encode(values, seed=1)), values)


@settings(max_examples=200, deadline=None)
@given(quantisers, st.data())
def test_only_for_a_group_stored_exactly_is_the_step_0(codec, data):
    scale = 2.0 ** data.draw(st.integers(-149, 10))
    values = torch.tensor(data.draw(_singles(1.0))).mul(scale)
    packet = codec.encode(values, seed=1)
    decoded = _filled(codec, codec.decode(packet))
    is_zero = (_records(codec, packet.payload).step == 0).squeeze(-1)
    assert torch.equal(decoded[is_zero], _filled(codec, values)[is_zero])


def test_a_tiny_range_does_not_collapse_to_its_minimum():
    values = 1 + 2.0**-20 * torch.arange(16)
    decoded = GroupQuantised(num_bits=4, group_size=16).decode(
        GroupQuantised(num_bits=4, group_size=16).encode(values)
    )
    # Here 1 / step lies far beyond float16: 15 / 2**-20 * 2**4.
    assert torch.equal(decoded, values)


@settings(max_examples=60, deadline=None)
@given(quantisers, st.integers(1, 30))
def test_zeros_decode_to_zeros_and_symmetric_grids_keep_zero(codec, length):
    assert not codec.decode(codec.encode(torch.zeros(length), seed=1)).any()
    values = torch.linspace(-3, 5, length)
    values[::2] = 0
    if codec.symmetric:
        assert not codec.decode(codec.encode(values, seed=1))[::2].any()


def test_the_sign_of_zero_leaves_no_trace():
    codec, one, other = (
        GroupQuantised(num_bits=4, group_size=2),
        [[0.0, -0.0], [-0.0, 1.0]],
        [[-0.0, 0.0], [0.0, 1.0]],
    )
    assert torch.equal(codec.encode(torch.tensor(one)).payload, codec.encode(torch.tensor(other)).payload)


@settings(max_examples=60, deadline=None)
@given(nearest_quantisers, st.integers(1, 30))
def test_symmetric_grids_treat_both_signs_alike(codec, length):
    assume(codec.symmetric)
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    assert torch.equal(codec.decode(codec.encode(-values)), -codec.decode(codec.encode(values)))


@settings(max_examples=60, deadline=None)
@given(quantisers, st.integers(1, 30))
def test_filling_up_never_changes_the_range_of_the_last_group(codec, length):
    values = torch.linspace(100, 101, length)
    payload = codec.encode(values, seed=1).payload
    filled = codec.encode(_filled(codec, values).float().view(-1), seed=1).payload
    assert torch.equal(payload, filled)


@settings(max_examples=60, deadline=None)
@given(nearest_quantisers, st.integers(1, 5), st.integers(1, 5), st.integers(1, 20))
def test_rows_can_be_appended_and_gathered(codec, first, second, length):
    values = torch.randn(first + second, length, generator=torch.Generator().manual_seed(length))
    whole = codec.encode(values).payload
    parts = [codec.encode(values[:first]).payload, codec.encode(values[first:]).payload]
    assert torch.equal(whole, torch.cat(parts))
    rows = torch.tensor([first, 0, first])
    gathered = whole.view(first + second, -1)[rows].view(-1)
    decoded = torch.empty(3, length)
    codec.decode_into(gathered, (3, length), torch.float32, decoded)
    assert torch.equal(decoded, codec.decode(codec.encode(values))[rows])


@settings(max_examples=60, deadline=None)
@given(quantisers, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_groups_are_in_c_order_with_dim_moved_last(codec, shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    along = GroupQuantised(**{**vars(codec), "dim": dim})
    moved = values.movedim(dim, -1)
    assert torch.equal(along.encode(values, seed=2).payload, codec.encode(moved, seed=2).payload)
    assert along.num_groups(tuple(shape)) * along.group_bytes == along.encode(values, seed=2).payload.numel()


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_beyond_the_range_of_scale_dtype_the_grid_saturates(scale_dtype, symmetric):
    codec = GroupQuantised(num_bits=4, group_size=4, symmetric=symmetric, scale_dtype=scale_dtype)
    largest = torch.finfo(torch.float32).max
    decoded = codec.decode(codec.encode(torch.tensor([-largest, -1.0, 1.0, largest])))
    limit = min(torch.finfo(scale_dtype).max, 2.0**126)
    reach = {(False, True): 14 * limit, (True, True): 7 * limit}.get((symmetric, limit == 65504), limit)
    expected = [-reach if symmetric else -limit, reach]
    # The step is rounded up to scale_dtype: at most one part in 2**7 for bfloat16.
    assert decoded.isfinite().all()
    assert decoded[[0, 3]].tolist() == pytest.approx(expected, rel=2.0**-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_group_wholly_beyond_the_range_of_scale_dtype_decodes_to_its_nearest_level(sign, symmetric):
    codec = GroupQuantised(num_bits=4, group_size=2, symmetric=symmetric)
    decoded = codec.decode(codec.encode(sign * torch.tensor([1e30, 2e30])))
    reach = 7 * 65504.0 if symmetric else {-1.0: 65504.0, 1.0: 16 * 65504.0}[sign]
    assert decoded.tolist() == [sign * reach, sign * reach]


def test_decoding_into_float16_never_overflows():
    codec = GroupQuantised(num_bits=4, group_size=2)
    values = torch.tensor([0.0, 65504.0], dtype=torch.float16)
    # The step, 4366.9, is stored as 4368; 15 steps are 65520, which float16 rounds to infinity.
    assert codec.decode(codec.encode(values)).tolist() == [0.0, 65504.0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_on_the_cpu(bad, symmetric):
    codec = GroupQuantised(num_bits=4, group_size=4, symmetric=symmetric)
    with pytest.raises(InputError, match=r"nan|inf"):
        codec.encode(torch.tensor([1.0] * 6 + [bad]))


def test_a_float64_beyond_float32_is_refused():
    with pytest.raises(InputError, match="inf"):
        GroupQuantised(num_bits=4).encode(torch.tensor([1e300], dtype=torch.float64))


def test_stochastic_rounding_without_a_seed_is_refused():
    with pytest.raises(UsageError, match="seed"):
        GroupQuantised(num_bits=4, rounding="stochastic").encode(torch.ones(3))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_bits", [2, 4])
def test_stochastic_rounding_is_unbiased_over_seeds(num_bits, symmetric):
    codec = GroupQuantised(num_bits=num_bits, group_size=16, rounding="stochastic", symmetric=symmetric)
    values = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    num_seeds = 1000
    packets = [codec.encode(values, seed=seed) for seed in range(num_seeds)]
    mean = torch.stack([codec.decode(packet) for packet in packets]).double().mean(0)
    step = _records(codec, packets[0].payload).step
    # Hoeffding: every rounding lies within a step, so a mean misses by more than this once in 10**9 tests.
    tolerance = step * math.sqrt(math.log(2 * values.numel() * 1e9) / (2 * num_seeds))
    assert ((mean - values.double()).abs() <= tolerance + 2.0**-18).all()


def test_stochastic_rounding_is_unbiased_over_elements():
    codec = GroupQuantised(num_bits=2, group_size=4, rounding="stochastic", scale_dtype=torch.float32)
    num_groups, values = 2**16, torch.tensor([0.0, 0.125, 2.75, 3.0])
    decoded = codec.decode(codec.encode(values.repeat(num_groups, 1), seed=5)).double().mean(0)
    tolerance = math.sqrt(math.log(8e9) / (2 * num_groups))  # Hoeffding, as above, with a step of 1
    assert ((decoded - values).abs() <= tolerance).all()
    assert decoded[0] == 0
    assert decoded[3] == 3


def test_stochastic_codes_are_a_function_of_the_seed_and_the_position_not_of_the_blocks():
    codec = GroupQuantised(num_bits=2, group_size=64, rounding="stochastic")
    values = torch.rand(9000, 64, generator=torch.Generator().manual_seed(0))  # more than two blocks
    whole = codec.encode(values, seed=3).payload
    assert torch.equal(codec.encode(values[:100], seed=3).payload, whole[: 100 * codec.group_bytes])
    assert torch.equal(codec.encode(values, seed=3).payload, whole)
    assert not torch.equal(codec.encode(values, seed=4).payload, whole)


@pytest.mark.parametrize("shape", [(3, 200_000), (2100, 70), (2, 5, 50_000)], ids=str)
def test_blocks_leave_no_seam(shape):
    codec = GroupQuantised(num_bits=4, group_size=32)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = codec.encode(values)
    rows = values.view(-1, shape[-1])
    parts = [
        codec.encode(row[start : start + 32_000]) for row in rows for start in range(0, len(row), 32_000)
    ]
    if shape[-1] > 1000:
        assert torch.equal(whole.payload, torch.cat([part.payload for part in parts]))
    expected = torch.cat([codec.decode(part) for part in parts]).view(shape)
    assert torch.equal(codec.decode(whole), expected)


@given(size=st.integers(1, 9), data=st.data())
def test_of_one_bit_the_levels_are_the_extremes(size, data):
    codec = GroupQuantised(num_bits=1, group_size=size, scale_dtype=torch.float32)
    values = torch.tensor(data.draw(_singles(30000.0)))
    packet = codec.encode(values)
    records = _records(codec, packet.payload)
    assert (codec.decode(packet).double() - values.double()).abs().le(_bounds(codec, records, values)).all()
    groups = _filled(codec, values)
    assert torch.equal(records.low.squeeze(-1), groups.amin(-1))
    # The step is a difference rounded in float32, and then up to be sure that the grid covers the group.
    spans = groups.amax(-1) - groups.amin(-1)
    assert ((records.step.squeeze(-1) - spans).abs() <= 2.0**-22 * spans + 2.0**-126).all()


def test_one_bit_has_no_symmetric_grid():
    with pytest.raises(UsageError, match="has one level, 0. Use the codec sign"):
        GroupQuantised(num_bits=1, symmetric=True)
