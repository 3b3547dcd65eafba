"""Error feedback loses nothing; low-rank factors hold what has low rank."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capstan.codecs import ErrorFeedback, codec_from_name
from capstan.codecs.low_rank import back, is_worth_it, orthonormal, project, restore, starting_factor
from capstan.errors import InputError

CODECS = ["sign:64", "topk:0.05", "randomk:0.1", "group4:32", "group2:32:float32", "minmax8"]


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_what_was_decoded_and_the_residual_are_the_sum_of_all_values(name, seed):
    feedback = ErrorFeedback(codec_from_name(name))
    generator = torch.Generator().manual_seed(seed)
    told, said = torch.zeros(500), torch.zeros(500)
    for step in range(12):
        values = torch.randn(500, generator=generator)
        payload = torch.empty(feedback.codec.encoded_bytes((500,), torch.float32), dtype=torch.uint8)
        decoded = feedback.encode_into(values, payload, key="bucket 0", seed=step)
        again = feedback.codec.decode_into
        check = torch.empty(500)
        again(payload, (500,), torch.float32, check)
        assert torch.equal(decoded, check)
        told, said = told + decoded, said + values
    residual = feedback.residual("bucket 0")
    assert residual is not None
    # Some 36 additions of numbers below 64, each rounded to 2**-24 of them.
    torch.testing.assert_close(told + residual, said, atol=36 * 64 * 2.0**-24, rtol=0)


def test_keys_do_not_meet_and_state_goes_on_exactly():
    codec = codec_from_name("sign:8")
    one, other = ErrorFeedback(codec), ErrorFeedback(codec)
    payload = torch.empty(codec.encoded_bytes((16,), torch.float32), dtype=torch.uint8)
    values = torch.randn(16, generator=torch.Generator().manual_seed(3))
    first = one.encode_into(values, payload, key="a")
    assert torch.equal(one.encode_into(values, payload, key="b"), first)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.encode_into(values, payload, key="a"), other.encode_into(values, payload, key="a"))
    assert sorted(one) == ["a", "b"]


def test_a_residual_of_another_shape_is_refused():
    feedback = ErrorFeedback(codec_from_name("identity"))
    feedback.encode_into(torch.ones(2), torch.empty(8, dtype=torch.uint8), key="a")
    with pytest.raises(InputError, match="'a'"):
        feedback.encode_into(torch.ones(3), torch.empty(12, dtype=torch.uint8), key="a")


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 4), extra=st.integers(0, 2), seed=st.integers(0, 2**31))
@example(rank=1, extra=0, seed=797570)  # a start that nearly misses the matrix
def test_factors_of_at_least_the_true_rank_hold_the_matrix(rank, extra, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(12, rank, generator=generator), torch.randn(rank, 9, generator=generator)
    start = starting_factor(9, rank + extra, seed=seed)
    matrix = left @ right
    basis = orthonormal(project(matrix, start))
    restored = restore(basis, back(matrix, basis))
    # Let C = right start, of full rank, so that left = (left C) C+. What is projected is left C with an error
    # e, and lies in the span of the basis; of left right there remains outside no more than e C+ right.
    # Products of inner length n are off by n * 2**-24 of the product of magnitudes, here in four places: the
    # matrix (n <= 4) times the start (n = 9), QR (some n = 12), and back and restored (12 and at most 6).
    rounding = 2.0**-24
    size = torch.linalg.norm(left.double()) * torch.linalg.norm(right.double())
    missed = torch.linalg.norm(torch.linalg.pinv(right.double() @ start.double()) @ right.double(), ord=2)
    outside = (rank + 9 + 12) * rounding * size * torch.linalg.norm(start.double()) * missed
    tolerance = float(outside + (rank + 12 + 12 + 6) * rounding * size)
    assert torch.linalg.norm((restored - matrix).double()) <= tolerance


def test_small_matrices_are_not_worth_it():
    assert is_worth_it(100, 100, 4)
    assert not is_worth_it(4, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sign:64", "topk:0.05", "group4:32"])
def test_what_16_bit_values_are_owed_is_not_rounded_to_16_bits(name, dtype):
    feedback = ErrorFeedback(codec_from_name(name))
    generator = torch.Generator().manual_seed(0)
    told, said = torch.zeros(500), torch.zeros(500)
    for step in range(60):
        values = (torch.randn(500, generator=generator) + 1).to(dtype)
        payload = torch.empty(feedback.codec.encoded_bytes((500,), dtype), dtype=torch.uint8)
        decoded = feedback.encode_into(values, payload, key="a", seed=step)
        assert decoded.dtype == dtype
        told, said = told + decoded.float(), said + values.float()
    # Some 180 additions of numbers below 128, in float32.
    torch.testing.assert_close(told + feedback.residual("a"), said, atol=180 * 128 * 2.0**-24, rtol=0)


@pytest.mark.parametrize("name", CODECS)
def test_an_infinity_passes_once_or_is_refused_and_is_not_owed(name):
    feedback = ErrorFeedback(codec_from_name(name))
    payload = torch.empty(feedback.codec.encoded_bytes((128,), torch.float32), dtype=torch.uint8)
    for step in range(4):
        values = torch.ones(128)
        if step == 1:
            values[5] = torch.inf
        try:
            decoded = feedback.encode_into(values, payload, key="a", seed=step)
        except InputError:  # as codecs with ranges say
            assert step == 1
        else:
            assert step == 1 or decoded.isfinite().all()
        assert feedback.residual("a").isfinite().all()


@given(factor=st.sampled_from([0.5, 2.0, 1024.0]))
def test_what_is_owed_follows_a_change_of_unit(factor):
    codec = codec_from_name("sign:8")
    one, other = ErrorFeedback(codec), ErrorFeedback(codec)
    payload = torch.empty(codec.encoded_bytes((16,), torch.float32), dtype=torch.uint8)
    values = torch.randn(16, generator=torch.Generator().manual_seed(3))
    for each in (one, other):
        each.encode_into(values, payload, key="a")
    other.rescale(factor)
    plain = one.encode_into(values, payload, key="a")
    assert torch.equal(other.encode_into(values * factor, payload, key="a"), plain * factor)


def test_a_state_with_16_bit_residuals_is_gone_on_with():
    feedback = ErrorFeedback(codec_from_name("sign:8"))
    feedback.load_state_dict({"a": torch.full((8,), 0.5, dtype=torch.bfloat16)})
    payload = torch.empty(feedback.codec.encoded_bytes((8,), torch.bfloat16), dtype=torch.uint8)
    decoded = feedback.encode_into(torch.ones(8, dtype=torch.bfloat16), payload, key="a")
    assert torch.equal(decoded, torch.full((8,), 1.5, dtype=torch.bfloat16))
    assert feedback.residual("a").dtype == torch.float32
