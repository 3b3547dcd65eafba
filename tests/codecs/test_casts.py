"""Casts and the conversion on the way: bounded error, no overflow; identity: the same bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.codecs import Cast, Identity
from capstan.codecs.casts import TARGETS
from capstan.codecs.dtypes import DTYPE_NAMES, dtype_from_name

targets = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
singles = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)


@targets
@settings(max_examples=60, deadline=None)
@given(values=singles)
def test_error_is_at_most_half_an_eps_of_the_value_or_of_the_smallest_normal(target, values):
    info, given_values = torch.finfo(target), torch.tensor(values)
    decoded = Cast(dtype=target).decode(Cast(dtype=target).encode(given_values))
    inside = given_values.abs() <= info.max
    error = (decoded.double() - given_values.double()).abs()
    bound = info.eps / 2 * given_values.double().abs().clamp(min=info.smallest_normal)
    assert (error <= bound)[inside].all()


@targets
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_finite_value_beyond_max_becomes_max_with_its_sign(target, source):
    largest, limit = torch.finfo(source).max, torch.finfo(target).max
    values = torch.tensor([largest, -largest], dtype=source)
    decoded = Cast(dtype=target).decode(
        Cast(dtype=target).encode(values), out=torch.empty(2, dtype=torch.float64)
    )
    expected = min(
        limit, float(torch.tensor(largest, dtype=torch.float64).to(target)) if largest < limit else limit
    )
    assert decoded.tolist() == [expected, -expected]


@targets
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside an overflow"])
def test_infinities_and_nan_stay_where_the_type_has_them(target, is_alone):
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0 if is_alone else 1e30])
    decoded = Cast(dtype=target).decode(Cast(dtype=target).encode(values))
    limit = 448.0 if target == torch.float8_e4m3fn else math.inf
    assert decoded[:2].tolist() == [limit, -limit]
    assert decoded[2].isnan()


@pytest.mark.parametrize("codec", [Identity(), Cast(dtype=torch.float32), Cast(dtype=torch.bfloat16)])
def test_decoding_into_a_narrower_type_keeps_finite_values_finite(codec):
    values = torch.tensor([65504.0, -70000.0, 3e38, 1.0, math.nan], dtype=torch.bfloat16)
    decoded = codec.decode(codec.encode(values), out=torch.empty(5, dtype=torch.float16))
    assert decoded[:4].isfinite().all()
    assert decoded[:4].tolist() == [65504.0, -65504.0, 65504.0, 1.0]
    assert decoded[4].isnan()


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_identity_gives_the_same_bits(name):
    dtype = dtype_from_name(name)
    raw = torch.randint(0, 2 if name == "bool" else 256, (6, 8 * 5), dtype=torch.uint8)
    values = raw.view(dtype)
    decoded = Identity().decode(Identity().encode(values))
    assert decoded.dtype == dtype
    assert torch.equal(decoded.view(torch.uint8), raw)
    assert torch.equal(
        Identity().encode(values.T).payload.view(dtype).view(values.T.shape).T.contiguous().view(torch.uint8),
        raw,
    )
