"""What every codec promises, whatever its kind."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from capstan.codecs import Codec, codec_from_name
from capstan.codecs.elements import saturating_cast
from capstan.errors import InputError

NAMES = [
    "identity",
    "cast:float32",
    "cast:float16",
    "cast:bfloat16",
    "cast:float8_e4m3fn",
    "group1:5",
    "group6:5",
    "group7:9",
    "group2:5",
    "group3:7:bfloat16:dim0",
    "group4:64",
    "group4:6:symmetric:stochastic:float32:dim0",
    "group8:3:symmetric",
    "group8:4:stochastic:dim-2",
]
# These look at the whole tensor at once, so their temporary memory grows with it.
WHOLE_NAMES = ["minmax8", "minmax8:clamped", "topk:0.3", "topk:0.5:bfloat16", "randomk:0.3:float16", "sign:8"]
EVERY_NAME = NAMES + WHOLE_NAMES
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

every_codec = pytest.mark.parametrize("codec", [codec_from_name(name) for name in EVERY_NAME], ids=EVERY_NAME)
shapes = st.lists(st.integers(0, 9), min_size=2, max_size=4).map(tuple)
seeds = st.integers(0, 2**32)


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_codec
@settings(max_examples=25, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(FLOATS), seed=seeds)
def test_encoded_bytes_is_exact_and_decode_gives_shape_and_type(codec: Codec, shape, dtype, seed):
    packet = codec.encode(normal(shape, seed, dtype), seed=seed)
    assert packet.payload.shape == (codec.encoded_bytes(shape, dtype),)
    decoded = codec.decode(packet)
    assert (packet.codec, tuple(decoded.shape), decoded.dtype) == (codec.name, shape, dtype)
    assert decoded.isfinite().all()


@every_codec
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_strided_values_encode_like_contiguous_ones(codec: Codec, shape, seed, data):
    order = data.draw(st.permutations(range(len(shape))))
    values = normal(shape, seed).permute(order)[..., ::2]
    contiguous = codec.encode(values.contiguous(), seed=seed)
    assert torch.equal(codec.encode(values, seed=seed).payload, contiguous.payload)


@every_codec
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_payload_may_start_anywhere_in_a_slab_and_its_neighbours_are_untouched(codec: Codec, offset):
    values = normal((7, 11))
    plain = codec.encode(values, seed=1)
    size = plain.payload.numel()
    slab = torch.full((size + 8,), 0xA5, dtype=torch.uint8)
    codec.encode_into(values, slab[offset : offset + size], seed=1)
    assert torch.equal(slab[offset : offset + size], plain.payload)
    assert (slab[:offset] == 0xA5).all()
    assert (slab[offset + size :] == 0xA5).all()
    for dtype in (torch.float32, torch.bfloat16):
        decoded = torch.full((7, 11), math.nan, dtype=dtype)
        codec.decode_into(slab[offset : offset + size], (7, 11), torch.float32, decoded)
        assert torch.equal(decoded, codec.decode(plain, out=torch.empty_like(decoded)))


@every_codec
@pytest.mark.parametrize("offset", [1, 2])
def test_a_payload_may_lie_at_any_address(codec: Codec, offset):
    packet = codec.encode(normal((7, 11)), seed=1)
    buffer = bytearray(offset) + bytearray(packet.payload.numpy())
    payload = torch.frombuffer(buffer, dtype=torch.uint8, offset=offset)
    decoded = torch.empty(7, 11)
    codec.decode_into(payload, (7, 11), torch.float32, decoded)
    assert torch.equal(decoded, codec.decode(packet))


@every_codec
@settings(max_examples=15, deadline=None)
@given(shape=shapes, source=st.sampled_from(FLOATS), target=st.sampled_from(FLOATS), seed=seeds)
def test_decoding_into_another_type_rounds_the_decoded_value_once(codec: Codec, shape, source, target, seed):
    values = normal(shape, seed, source)
    packet = codec.encode(values, seed=seed)
    out = torch.full(shape, math.nan, dtype=target)
    assert codec.decode(packet, out=out) is out
    # A codec's own values: float64 holds them all without rounding.
    exact = codec.decode(packet, out=torch.empty(shape, dtype=torch.float64))
    assert torch.equal(out, saturating_cast(exact, target))


@every_codec
def test_decoding_into_strided_memory_writes_every_element_and_no_other(codec: Codec):
    packet = codec.encode(normal((5, 6, 7)), seed=1)
    memory = torch.full((7, 12, 5), math.nan)
    codec.decode(packet, out=memory.permute(2, 1, 0)[:, ::2])
    assert torch.equal(memory.permute(2, 1, 0)[:, ::2], codec.decode(packet))
    assert memory.permute(2, 1, 0)[:, 1::2].isnan().all()


@every_codec
def test_one_element_of_any_stride_is_encoded_and_decoded(codec: Codec):
    # Such a tensor is contiguous to torch, whatever its stride; views by another type do not agree.
    memory = torch.tensor([[-1.5, 0.0]])
    packet = codec.encode(memory[:, ::2], seed=1)
    decoded = codec.decode(packet, out=torch.empty(1, 2)[:, ::2])
    assert decoded.item() == codec.decode(packet).item() == pytest.approx(-1.5, rel=2.0**-10)


@every_codec
def test_scalars_and_empty_tensors_are_tensors(codec: Codec):
    if "dim-2" in codec.name:
        with pytest.raises(InputError, match="dim -2"):
            codec.encode(torch.tensor(1.0), seed=1)
        return
    decoded = codec.decode(codec.encode(torch.tensor(-1.5), seed=1))
    assert decoded.shape == ()
    assert codec.decode(codec.encode(torch.empty(0, 3), seed=1)).shape == (0, 3)


@every_codec
def test_encode_into_given_memory_refers_to_it(codec: Codec):
    memory = torch.empty(codec.encoded_bytes((4, 4), torch.float32), dtype=torch.uint8)
    assert codec.encode(normal((4, 4)), out=memory, seed=1).payload is memory


@every_codec
def test_the_default_element_type_has_no_influence(codec: Codec):
    values = normal((5, 7))
    packet = codec.encode(values, seed=1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = codec.encode(values, seed=1)
        decoded = codec.decode(again)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again.payload, packet.payload)
    assert torch.equal(decoded, codec.decode(packet))


@every_codec
def test_gradients_and_the_global_generator_are_left_alone(codec: Codec):
    values = normal((4, 4)).requires_grad_()
    before = torch.get_rng_state()
    assert not codec.decode(codec.encode(values, seed=1)).requires_grad
    assert torch.equal(before, torch.get_rng_state())


@every_codec
def test_what_does_not_fit_is_refused(codec: Codec):
    values, shape = normal((4, 4)), (4, 4)
    size = codec.encoded_bytes(shape, torch.float32)
    good = torch.zeros(size, dtype=torch.uint8)
    bad_payloads = [
        torch.empty(size + 1, dtype=torch.uint8),
        torch.empty(size, dtype=torch.int8),
        torch.empty((1, size), dtype=torch.uint8),
        torch.empty(2 * size, dtype=torch.uint8)[::2],
    ]
    for payload in bad_payloads:
        with pytest.raises(InputError):
            codec.encode_into(values, payload, seed=1)
        with pytest.raises(InputError):
            codec.decode_into(payload, shape, torch.float32, torch.empty(shape))
    for out in (torch.empty(4, 5), torch.empty(shape, dtype=torch.int32), torch.empty(shape, device="meta")):
        with pytest.raises(InputError):
            codec.decode_into(good, shape, torch.float32, out)


@every_codec
def test_a_packet_of_another_codec_is_refused(codec: Codec):
    other = codec_from_name("group4:1" if codec.name == "identity" else "identity")
    with pytest.raises(InputError, match=codec.name):
        codec.decode(other.encode(normal((4, 4))))


@pytest.mark.parametrize("name", EVERY_NAME[1:])
def test_values_that_are_not_floating_point_are_refused(name):
    with pytest.raises(InputError, match="int64"):
        codec_from_name(name).encode(torch.arange(4).view(2, 2), seed=1)


class LiveBytes(TorchDispatchMode):
    """Follows every storage that operations return; `peak` is the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.known: set[int] = set()

    def ignoring(self, *tensors: torch.Tensor) -> "LiveBytes":
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def test_live_bytes_sees_what_is_alive_and_forgets_what_is_not():
    with LiveBytes() as memory:
        first = torch.zeros(100, dtype=torch.uint8)
        del first
        second = torch.zeros(70, dtype=torch.uint8) + torch.zeros(70, dtype=torch.uint8)
        del second
    assert memory.peak == 210


# A sparse payload of any bytes is refused: its own tests look at its memory.
SCRATCH_NAMES = [
    *NAMES,
    "minmax8",
    "sign:8",
    "group2:1",
    "group3:1",
    "group4:1:float32",
    "group3:64",
    "group3:3",
]


@pytest.mark.parametrize("name", SCRATCH_NAMES)
@pytest.mark.parametrize("shape", [(3, 3), (70, 110)], ids=str)
def test_scratch_bytes_bounds_the_temporary_memory_of_decode_into(name, shape):
    codec = codec_from_name(name)
    outs = [torch.empty(shape, dtype=dtype) for dtype in FLOATS]
    outs += [out.T.contiguous().T for out in outs]
    for offset, dtype, out in itertools.product((0, 1), FLOATS[:2], outs):
        size = codec.encoded_bytes(shape, dtype)
        # Any bytes: with NaN and infinities among the values, nothing is spared.
        slab = torch.randint(0, 256, (size + 1,), dtype=torch.uint8)
        with LiveBytes().ignoring(slab, out) as memory:
            codec.decode_into(slab[offset : offset + size], shape, dtype, out)
        assert memory.peak <= codec.scratch_bytes(shape, dtype)


@pytest.mark.parametrize("name", ["identity", "cast:float32", "group3:5", "group4:64"])
def test_temporary_memory_does_not_grow_with_the_tensor(name):
    codec, out = codec_from_name(name), torch.empty(700, 1100, dtype=torch.float16)
    slab = torch.zeros(codec.encoded_bytes((700, 1100), torch.float64) + 1, dtype=torch.uint8)
    with LiveBytes().ignoring(slab, out) as memory:
        codec.decode_into(slab[1:], (700, 1100), torch.float64, out)
    # As float64 the tensor takes 6 MiB; a block is 2**18 elements, of at most 8 bytes and a result of 2.
    assert memory.peak <= 10 * 2**18


def test_scratch_bytes_bounds_a_group_that_is_larger_than_a_block():
    codec, shape = codec_from_name("group2:2000000"), (2_000_000,)
    payload = torch.zeros(codec.encoded_bytes(shape, torch.float32), dtype=torch.uint8)
    out = torch.empty(shape, dtype=torch.bfloat16)
    with LiveBytes().ignoring(payload, out) as memory:
        codec.decode_into(payload, shape, torch.float32, out)
    assert 4 * 2_000_000 < memory.peak <= codec.scratch_bytes(shape, torch.float32)


@pytest.mark.parametrize("codec", [codec_from_name(name) for name in NAMES], ids=NAMES)
def test_scratch_bytes_is_at_most_64_mib_however_large_the_tensor(codec: Codec):
    assert codec.scratch_bytes((10**5, 10**5), torch.float32) <= 64 * 2**20
