"""The symmetric grid with all its levels: bytes by a reference, and what it loses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import InputError, UsageError
from capstan.pipelining import Compression
from capstan.pipelining.midrise import MidRise


def reference(values: np.ndarray, bits: int, group: int) -> tuple[bytes, np.ndarray]:
    """The definition, one value at a time."""
    levels, payload, decoded = 2**bits - 1, b"", np.zeros_like(values)
    for row, out in zip(values, decoded, strict=True):
        for start in range(0, len(row), group):
            part = np.zeros(group, dtype=np.float32)
            part[: len(row[start : start + group])] = row[start : start + group]
            scale = torch.tensor(np.abs(part).max()).to(torch.bfloat16)
            s = np.float32(scale.item())
            word = 0
            for at, value in enumerate(part):
                u = (value / s if s else value) + np.float32(1)
                code = int(np.clip(np.rint(u * np.float32(levels / 2)), 0, levels))
                word |= code << (bits * at)
                if start + at < len(row):
                    level = np.float32(code) * np.float32(2 / levels) - np.float32(1)
                    out[start + at] = level * s
            payload += word.to_bytes(-(-group * bits // 8), "little")
            payload += bytes(scale[None].view(torch.uint8).tolist())
    return payload, decoded


@given(
    bits=st.integers(1, 8),
    group=st.integers(1, 20),
    columns=st.integers(1, 33),
    exponent=st.integers(-37, 36),
    seed=st.integers(0, 999),
)
def test_bytes_and_values_are_those_of_the_definition(bits, group, columns, exponent, seed):
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    values[1] = 0
    codec = MidRise(num_bits=bits, group_size=group)
    packet = codec.encode(values)
    payload, decoded = reference(values.numpy(), bits, group)
    assert bytes(packet.payload.tolist()) == payload
    assert np.array_equal(codec.decode(packet).numpy(), decoded)
    assert MidRise.from_name(codec.name) == codec


def test_two_bits_have_four_levels_and_take_18_bytes_for_64_values():
    codec = MidRise(num_bits=2)
    values = torch.tensor([-1.0, -0.4, 0.1, 0.9, 1.0] + [0.0] * 59)
    packet = codec.encode(values)
    assert len(packet.payload) == 18
    third = 1 / 3
    assert codec.decode(packet)[:5].tolist() == pytest.approx([-1, -third, third, 1, 1])


def test_stochastic_rounding_has_no_bias():
    codec, value = MidRise(num_bits=2, group_size=4, is_stochastic=True), torch.tensor([1.0, 0.2, -0.7, 0.0])
    mean = codec.decode(codec.encode(value.repeat(4000, 1), seed=7)).mean(0)
    # A level is 2/3 from the next: a standard error of at most 1/3 / sqrt(4000) = 0.0053; five of them.
    torch.testing.assert_close(mean, value, atol=0.027, rtol=0)
    with pytest.raises(UsageError, match="Give a seed"):
        codec.encode(value)


def test_what_has_no_grid_is_refused():
    with pytest.raises(InputError, match="finite"):
        MidRise(num_bits=2).encode(torch.tensor([1.0, torch.inf]))
    with pytest.raises(UsageError, match="1 to 8 bits"):
        MidRise(num_bits=9)
    with pytest.raises(UsageError, match="Cannot read"):
        MidRise.from_name("midrise2")
    with pytest.raises(UsageError, match="Choose one"):
        Compression.of_bits(forward_bits=2, backward_bits=4, symmetric=True, midrise=True)
    with pytest.raises(UsageError, match="no codec of 9 bits for forward"):
        Compression.of_bits(forward_bits=9, backward_bits=4, midrise=True)
