"""An accelerator gives the bits that the CPU gives."""

import math

import pytest
import torch

from capstan.codecs import codec_from_name

NAMES = [
    "identity",
    "cast:float16",
    "cast:bfloat16",
    "cast:float8_e4m3fn",
    *(
        f"group{num_bits}:{size}{rest}"
        for num_bits in (2, 3, 4, 6, 8)
        for size in (64, 7)
        for rest in ("", ":stochastic", ":symmetric:bfloat16", ":symmetric:stochastic:float32:dim0")
    ),
]


def _hard_values() -> torch.Tensor:
    """Every magnitude from 2**-140 to 2**120, ties, and ordinary numbers: more than one block."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(900, 1100, generator=generator)
    values[:300] *= torch.exp2(torch.randint(-140, 121, (300, 1100), generator=generator).float())
    values[300:400] = torch.randint(-15, 16, (100, 1100), generator=generator) / 2
    return values


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encode_and_decode_give_the_same_bits_on_cpu_and_cuda(name, dtype):
    codec, values = codec_from_name(name), _hard_values().to(dtype)
    packet, on_device = codec.encode(values, seed=9), codec.encode(values.cuda(), seed=9)
    assert torch.equal(on_device.payload.cpu(), packet.payload)
    for out in (torch.float32, torch.float16, dtype):
        decoded = codec.decode(packet, out=torch.empty(values.shape, dtype=out))
        device_out = torch.empty(values.shape, dtype=out, device="cuda")
        assert torch.equal(codec.decode(on_device, out=device_out).cpu(), decoded)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["group4:4", "group4:4:symmetric"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_group_with_nan_or_infinity_decodes_to_nan_on_an_accelerator(name, bad):
    values = torch.ones(3, 4)
    values[1, 2] = bad
    codec = codec_from_name(name)
    decoded = codec.decode(codec.encode(values.cuda())).cpu()
    assert decoded[1].isnan().all()
    assert decoded[[0, 2]].isfinite().all()
