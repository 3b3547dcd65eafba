"""Slabs: memory of an exact size, in pieces that do not touch each other."""

import gc
import mmap

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import DeviceError, DoesNotFit
from capstan.hardware.free_memory import Amount
from capstan.storage import Slab
from capstan.storage import slab as slab_module
from capstan.storage.slab import ALIGNMENT, aligned

CPU = torch.device("cpu")


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, 4097, 1_000_003])
def test_a_slab_has_exactly_the_size_asked_for_and_starts_as_zeros(size_bytes):
    with Slab("weights", size_bytes, device=CPU) as slab:
        assert slab.size_bytes == slab.bytes.numel() == size_bytes
        assert slab.bytes.dtype == torch.uint8
        assert not slab.bytes.any()


@given(st.integers(0, 2**40))
def test_aligned_is_the_next_multiple_of_the_alignment(size_bytes):
    assert aligned(size_bytes) % ALIGNMENT == 0
    assert 0 <= aligned(size_bytes) - size_bytes < ALIGNMENT


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), max_size=20))
def test_pieces_are_aligned_and_do_not_overlap(sizes):
    with Slab("weights", sum(map(aligned, sizes)), device=CPU) as slab:
        pieces = [slab.take(size) for size in sizes]
        for number, piece in enumerate(pieces):
            piece.fill_(number + 1)
        for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
            assert piece.numel() == size
            assert size == 0 or piece.data_ptr() % ALIGNMENT == 0
            assert (piece == number + 1).all()
        assert slab.used_bytes == slab.size_bytes


def test_every_dtype_can_view_every_piece():
    with Slab("weights", 4 * ALIGNMENT, device=CPU) as slab:
        slab.take(1)
        piece = slab.take(16)
        for dtype in (torch.float64, torch.int64, torch.complex128, torch.bfloat16, torch.bool):
            assert piece.view(dtype).data_ptr() == piece.data_ptr()


def test_the_last_piece_may_end_where_the_slab_ends():
    with Slab("weights", ALIGNMENT + 3, device=CPU) as slab:
        slab.take(5)
        assert slab.take(3).numel() == 3
        assert slab.used_bytes == slab.size_bytes


def test_more_than_is_left_does_not_fit_and_names_the_slab():
    with Slab("cache on the host", 1000, device=CPU) as slab:
        slab.take(65)
        with pytest.raises(DoesNotFit, match=r"'cache on the host' has 1,000 bytes, 128 in use; 873 more"):
            slab.take(873)
        assert slab.used_bytes == 128
        assert slab.take(872).numel() == 872


def test_more_than_the_host_has_does_not_fit_and_names_the_slab():
    with pytest.raises(DoesNotFit, match="cache on the host"):
        Slab("cache on the host", 2**60, device=CPU)


def test_more_than_the_device_has_does_not_fit_and_names_the_slab(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(DoesNotFit, match=r"meta has no 4,096 bytes left for 'weights'"):
        Slab("weights", 4096, device=torch.device("meta"))


def test_a_slab_for_a_device_lies_on_that_device():
    with Slab("weights", 4096, device=torch.device("meta")) as slab:
        assert slab.take(100).device.type == "meta"


def test_memory_is_given_back_after_close():
    size_bytes = 64 << 20
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    slab = Slab("weights", size_bytes, device=CPU)
    piece = slab.take(size_bytes)
    piece.fill_(1)
    assert process.memory_info().rss - before > 0.8 * size_bytes
    del piece
    slab.close()
    assert process.memory_info().rss - before < 0.2 * size_bytes


def test_memory_is_given_back_at_close_also_while_views_of_it_live():
    size_bytes = 64 << 20
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    slab = Slab("weights", size_bytes, device=CPU)
    piece = slab.take(size_bytes)
    piece.fill_(1)
    slab.close()
    assert process.memory_info().rss - before < 0.2 * size_bytes
    assert piece.numel() == size_bytes


def test_a_slab_takes_no_memory_before_it_is_written():
    before = psutil.Process().memory_info().rss
    with Slab("weights", 1 << 30, device=CPU):
        assert psutil.Process().memory_info().rss - before < 1 << 28


def test_closing_twice_is_harmless():
    slab = Slab("weights", 4096, device=CPU)
    slab.close()
    slab.close()
    assert slab.bytes.numel() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_a_slab_is_registered_with_cuda_only_where_there_is_one():
    with Slab("weights", 4096, device=CPU, pinned=True) as slab:
        assert slab.take(100).numel() == 100


@pytest.fixture
def pinning(monkeypatch) -> list[str]:
    """Pinning as on a machine with CUDA, as far as the host's part goes; what CUDA was asked for."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(slab_module, "_register", lambda *_: asked.append("register"))
    monkeypatch.setattr(slab_module, "_unregister", lambda *_: asked.append("unregister"))
    return asked


@pytest.mark.parametrize("size_bytes", [1, 4097, (64 << 20) + 4097])
def test_a_pinned_slab_has_exactly_its_size_starts_as_zeros_and_lies_in_memory_at_once(pinning, size_bytes):
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    with Slab("weights", size_bytes, device=CPU, pinned=True) as slab:
        assert process.memory_info().rss - before > 0.8 * size_bytes - (1 << 20)
        assert slab.size_bytes == slab.bytes.numel() == size_bytes
        assert not slab.bytes.any()
        assert pinning == ["register"]
    assert pinning == ["register", "unregister"]


@pytest.mark.parametrize("num_cores", [1, 3, 64])
@pytest.mark.parametrize("size_bytes", [1, 4096, 12_345_678])
def test_every_page_is_touched_by_however_many_threads(monkeypatch, num_cores, size_bytes):
    monkeypatch.setattr(slab_module, "usable_cores", lambda: Amount(num_cores, None))
    memory = torch.full((size_bytes,), 7, dtype=torch.uint8)
    slab_module._make_resident(memory)
    assert not memory[:: mmap.PAGESIZE].any()


def test_a_pinned_slab_of_more_than_is_free_does_not_fit_and_nothing_is_touched(monkeypatch, pinning):
    monkeypatch.setattr(slab_module, "free_host_memory", lambda: Amount(4095, None))
    with pytest.raises(DoesNotFit, match=r"no 4,096 bytes of memory left for 'weights': 4,095 are free"):
        Slab("weights", 4096, device=CPU, pinned=True)
    assert pinning == []


@pytest.mark.usefixtures("pinning")
def test_a_slab_that_cannot_be_pinned_gives_its_memory_back(monkeypatch):
    def refused(name: str, tensor: torch.Tensor) -> None:
        raise DeviceError("CUDA could not pin")

    monkeypatch.setattr(slab_module, "_register", refused)
    size_bytes = 64 << 20
    before = psutil.Process().memory_info().rss
    with pytest.raises(DeviceError) as kept:
        Slab("weights", size_bytes, device=CPU, pinned=True)
    assert psutil.Process().memory_info().rss - before < 0.2 * size_bytes
    assert kept.value.__traceback__ is not None  # which still holds the slab


@pytest.mark.gpu
def test_a_pinned_slab_is_pinned_until_it_is_closed():
    slab = Slab("weights", 1_000_003, device=CPU, pinned=True)
    piece = slab.take(4096)
    assert slab.bytes.is_pinned()
    assert piece.is_pinned()
    slab.close()
    assert not piece.is_pinned()


@pytest.mark.gpu
def test_an_empty_pinned_slab_and_one_that_is_closed_twice_are_harmless():
    Slab("weights", 0, device=CPU, pinned=True).close()
    slab = Slab("weights", 4096, device=CPU, pinned=True)
    slab.close()
    slab.close()
    with Slab("weights", 4096, device=CPU, pinned=True) as again:
        assert again.bytes.is_pinned()


@pytest.mark.gpu
def test_copies_beside_compute_from_and_to_a_pinned_slab_are_right():
    num_bytes = 64 << 20
    values = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    with Slab("weights", 2 * num_bytes, device=CPU, pinned=True) as slab:
        source, target = slab.take(num_bytes), slab.take(num_bytes)
        source.copy_(values)
        on_device = source.to("cuda", non_blocking=True)
        target.copy_(on_device, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(on_device.cpu(), values)
        assert torch.equal(target, values)


@pytest.mark.gpu
def test_closing_waits_for_copies_that_are_under_way():
    num_bytes = 64 << 20
    on_device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    with Slab("weights", num_bytes, device=CPU, pinned=True) as slab:
        slab.bytes.fill_(7)
        torch.cuda._sleep(100_000_000)
        on_device.copy_(slab.bytes, non_blocking=True)
    assert torch.cuda.current_stream().query()
    assert (on_device == 7).all()


@pytest.mark.gpu
def test_memory_on_the_device_is_exact_and_given_back():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with Slab("weights", 8 << 20, device=torch.device("cuda")) as slab:
        assert slab.take(100).is_cuda
        assert torch.cuda.memory_allocated() - before == 8 << 20
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_more_than_the_accelerator_has_does_not_fit():
    with pytest.raises(DoesNotFit, match=r"cuda has no .* bytes left for 'weights'"):
        Slab("weights", 2**45, device=torch.device("cuda"))
