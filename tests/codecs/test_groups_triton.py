"""The kernels on a CUDA device: the bits of the torch path, and that path wherever they cannot run."""

import math
import sys

import pytest
import torch

from capstan.codecs import GroupQuantised, codec_from_name, groups

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
NAMES = [
    f"group{num_bits}:{size}{rest}"
    for num_bits in (2, 4, 8)
    for size in (16, 32, 64, 128)
    for rest in ("", ":bfloat16", ":float32", ":symmetric", ":symmetric:bfloat16", ":symmetric:float32")
]


def _hard_rows(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Groups as rows, more than a program takes: every magnitude, ties, tiny ranges, constants, extremes."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.finfo(dtype).max
    rows = torch.randn(1300, size, generator=generator)
    rows[:300] *= torch.exp2(torch.randint(-149, 127, (300, size), generator=generator).float())
    rows[300:600] *= torch.exp2(torch.randint(-149, 127, (300, 1), generator=generator).float())
    rows[600:700] = torch.randint(-15, 16, (100, size), generator=generator) / 2
    rows[700:800] = rows[700:800, :1] * (1 + 2.0**-20 * torch.randn(100, size, generator=generator))
    rows[800:850] = rows[800:850, :1].clone()
    rows[850:860] = 0.0
    rows[855:860, ::3] = -0.0
    rows[860:900] = rows[860:900].abs() * torch.exp2(torch.arange(40).float())[:, None] * 2.0**14
    rows[900:910, 0], rows[900:910, 1] = limit, -limit
    rows[910], rows[911] = limit, -limit
    rows[912, 1], rows[913, 1] = 2.0**-149, -(2.0**-149)
    return rows.clamp(-limit, limit).to(dtype)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[values.element_size()])


def _covered(codec: GroupQuantised, rows: torch.Tensor) -> bool:
    return codec._kernels_for(codec._rows(rows)) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_encode_and_decode_give_the_bits_of_the_cpu_anywhere_in_a_slab(name, dtype):
    codec = codec_from_name(name)
    for seed, offset in enumerate((0, 1, 2, 36)):
        rows = _hard_rows(codec.group_size, dtype, seed)
        assert _covered(codec, rows.cuda())
        expected = codec.encode(rows).payload
        slab = torch.full((expected.numel() + 64,), 77, dtype=torch.uint8, device="cuda")
        payload = slab[offset : offset + expected.numel()]
        codec.encode_into(rows.cuda(), payload)
        assert torch.equal(payload.cpu(), expected)
        assert (slab[:offset] == 77).all()
        assert (slab[offset + expected.numel() :] == 77).all()
        for out in FLOATS:
            decoded = torch.empty(rows.shape, dtype=out)
            codec.decode_into(expected, tuple(rows.shape), dtype, decoded)
            memory = torch.full((rows.numel() + 64,), 77, dtype=out, device="cuda")
            on_device = memory[offset : offset + rows.numel()].view(rows.shape)
            codec.decode_into(payload, tuple(rows.shape), dtype, on_device)
            assert torch.equal(_bits(on_device).cpu(), _bits(decoded))
            assert (memory[:offset] == 77).all()
            assert (memory[offset + rows.numel() :] == 77).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_decode_like_on_the_cpu(name):
    codec, num_groups = codec_from_name(name), 5000
    generator = torch.Generator().manual_seed(1)
    payload = torch.randint(0, 256, (num_groups * codec.group_bytes,), dtype=torch.uint8, generator=generator)
    shape = (num_groups, codec.group_size)
    for out in FLOATS:
        decoded, on_device = torch.empty(shape, dtype=out), torch.empty(shape, dtype=out, device="cuda")
        codec.decode_into(payload, shape, torch.float32, decoded)
        codec.decode_into(payload.cuda(), shape, torch.float32, on_device)
        is_nan = decoded.isnan()
        assert torch.equal(on_device.isnan().cpu(), is_nan)
        assert torch.equal(_bits(on_device.cpu()[~is_nan]), _bits(decoded[~is_nan]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_give_the_bytes_of_the_torch_path(name, dtype, monkeypatch):
    codec = codec_from_name(name)
    rows = _hard_rows(codec.group_size, dtype)
    for place, bad in enumerate([math.nan, math.inf, -math.inf]):
        rows[place::10, place] = bad
    rows[3::10, 1:3] = torch.tensor([math.inf, -math.inf])
    packet = codec.encode(rows.cuda())
    monkeypatch.setattr(groups, "_kernels", lambda device: None)
    assert torch.equal(packet.payload, codec.encode(rows.cuda()).payload)
    decoded = codec.decode(packet)
    assert torch.equal(decoded.isnan().all(-1).cpu(), ~rows.isfinite().all(-1))


@pytest.mark.gpu
def test_rows_along_another_dim_are_covered_where_they_lie_together():
    values, codec = torch.randn(64, 40), codec_from_name("group4:32:dim0")
    transposed = values.cuda().t().contiguous().t()
    assert _covered(codec, transposed)
    assert not _covered(codec, values.cuda())
    for on_device in (transposed, values.cuda()):
        assert torch.equal(codec.encode(on_device).payload.cpu(), codec.encode(values).payload)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("group3:64", (4, 64), torch.float32),
        ("group4:48", (4, 96), torch.float32),
        ("group4:64", (4, 96), torch.float32),
        ("group4:64", (4, 64), torch.float64),
        ("group4:64", (4, 0), torch.float32),
        ("group4:64", (), torch.float32),
    ],
)
def test_what_the_kernels_do_not_cover_takes_the_torch_path(name, shape, dtype):
    codec, values = codec_from_name(name), torch.randn(shape, dtype=dtype)
    assert not _covered(codec, values.cuda())
    packet = codec.encode(values.cuda())
    assert torch.equal(packet.payload.cpu(), codec.encode(values).payload)
    assert torch.equal(codec.decode(packet).cpu(), codec.decode(codec.encode(values)))


@pytest.mark.gpu
def test_groups_beyond_two_to_the_31_elements_are_in_their_places():
    codec, repeats = codec_from_name("group4:64"), 2**15 + 1
    rows = torch.randn(1024, 64, dtype=torch.float16, device="cuda")
    many = rows.repeat(repeats, 1)  # 4 GiB
    packet = codec.encode(many)
    one = codec.encode(rows)
    assert torch.equal(packet.payload.view(repeats, -1)[-1], one.payload)
    codec.decode(packet, out=many.zero_())
    assert torch.equal(many[-1024:], codec.decode(one))


@pytest.mark.gpu
def test_where_no_kernel_can_be_built_the_torch_path_remains_and_a_warning_says_why(monkeypatch, caplog):
    kernels = groups._kernels(torch.device("cuda", 0))

    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "decode", no_compiler)
    assert groups._kernels.__wrapped__(torch.device("cuda", 0)) is None
    assert "C compiler" in caplog.text


def test_without_triton_the_torch_path_remains(monkeypatch):
    codec, values = codec_from_name("group4:64"), torch.randn(8, 64)
    expected = codec.encode(values)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "capstan.codecs.groups_triton", raising=False)
    find, found = groups._kernels.__wrapped__, []

    def as_on_cuda(_):
        found.append(find(torch.device("cuda")))
        return found[-1]

    monkeypatch.setattr(groups, "_kernels", as_on_cuda)
    packet = codec.encode(values)
    assert torch.equal(packet.payload, expected.payload)
    assert torch.equal(codec.decode(packet), codec.decode(expected))
    assert found == [None] * 3  # an encoding and two decodings


def test_values_on_the_cpu_never_import_the_kernels(monkeypatch):
    monkeypatch.delitem(sys.modules, "capstan.codecs.groups_triton", raising=False)
    codec = codec_from_name("group4:64")
    codec.decode(codec.encode(torch.randn(8, 64)))
    assert "capstan.codecs.groups_triton" not in sys.modules
