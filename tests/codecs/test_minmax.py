"""BAGUA's codec, byte for byte against its definition written with NumPy, defects included."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capstan.codecs import MinMaxUInt8
from capstan.errors import InputError


def defined(values: np.ndarray) -> bytes:
    """The wire format of BAGUA, section 4 of the paper page, in float32."""
    low, high = values.min(), values.max()
    scale = np.float32(255) / (high - low + np.float32(1e-7))
    top = np.rint(high * scale)
    bottom = top - np.float32(255)
    levels = np.minimum(np.rint(values * scale), top) - bottom
    codes = (levels.astype(np.int64) & 255).astype(np.uint8)
    return struct.pack("<ff", low, high).ljust(32, b"\0") + codes.tobytes()


@settings(max_examples=80, deadline=None)
@example(size=1, seed=304278, exponent=-5)  # one value, at a level beyond 2**24
@given(size=st.integers(1, 600), seed=st.integers(0, 2**31), exponent=st.integers(-20, 20))
def test_payloads_are_baguas_byte_for_byte(size, seed, exponent):
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * np.float32(2.0**exponent)
    payload = MinMaxUInt8().encode(torch.from_numpy(values)).payload
    assert payload.numpy().tobytes() == defined(values)


def test_a_code_below_0_wraps_as_baguas_does_and_is_kept_in_range_when_clamped():
    values = torch.tensor([-153.5, 0.0, 101.5])
    wrapped = MinMaxUInt8().decode(MinMaxUInt8().encode(values))
    assert wrapped[0].item() == pytest.approx(102, abs=0.5)
    clamped = MinMaxUInt8(clamped=True).decode(MinMaxUInt8(clamped=True).encode(values))
    assert (clamped - values).abs().max().item() <= 1.0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_clamped_the_error_is_at_most_a_step_and_a_half(seed, scale):
    # Half a step for the value, half for the top level, and half where the top had to move the bottom up.
    values = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * scale
    codec = MinMaxUInt8(clamped=True)
    step = (values.max() - values.min()).item() / 255
    assert (codec.decode(codec.encode(values)) - values).abs().max().item() <= 1.5 * step * (1 + 1e-3)


def test_small_gradients_drown_in_its_epsilon():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-10
    decoded = MinMaxUInt8().decode(MinMaxUInt8().encode(values))
    assert (decoded - values).norm() / values.norm() > 0.8


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="finite"):
        MinMaxUInt8().encode(torch.tensor([1.0, float("nan")]))
