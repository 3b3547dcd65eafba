"""LiveBytes: the peak is the one computed by hand, on the CPU and on the meta device."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.storage.live_bytes import LiveBytes

DEVICES = ["cpu", "meta"]
on_each_device = pytest.mark.parametrize("device", DEVICES)


@on_each_device
def test_temporaries_count_while_they_live(device):
    """Of a*b + c*d two products live, then the sum beside them, then the sum alone."""
    a, b, c, d = (torch.ones(1000, device=device) for _ in range(4))
    with LiveBytes() as live:
        total = a * b + c * d
        assert live.live_bytes == 4000
    assert live.peak_bytes == 3 * 4000
    assert total.shape == (1000,)


@on_each_device
def test_a_chain_of_layers_needs_two_activations_at_once(device):
    """x(8,64) @ (64,256) -> 8 KiB, relu -> 8 KiB more, first one freed, @ (256,64) -> 2 KiB."""
    x, up, down = (torch.ones(*shape, device=device) for shape in [(8, 64), (64, 256), (256, 64)])
    with LiveBytes() as live:
        hidden = x @ up
        assert live.live_bytes == 8192
        hidden = torch.relu(hidden)
        assert live.live_bytes == 8192
        output = hidden @ down
        del hidden
        assert live.live_bytes == 2048
    assert live.peak_bytes == 2 * 8192
    assert output.shape == (8, 64)


@on_each_device
def test_tensors_that_existed_before_do_not_count(device):
    before = torch.zeros(1000, device=device)
    with LiveBytes() as live:
        view = before[10:].view(2, -1)
        view.add_(1)
        del before, view
    assert (live.live_bytes, live.peak_bytes) == (0, 0)


@on_each_device
def test_views_do_not_count_twice_and_keep_their_storage_alive(device):
    with LiveBytes() as live:
        whole = torch.zeros(10, 100, device=device)
        parts = [*whole.split(3), whole.T, whole[0], whole.reshape(-1), whole.expand(2, 10, 100)]
        assert live.live_bytes == 4000
        del whole
        assert live.live_bytes == 4000
        parts.clear()
        assert live.live_bytes == 0
    assert live.peak_bytes == 4000


@on_each_device
def test_freed_tensors_are_subtracted_also_when_their_address_is_used_again(device):
    with LiveBytes() as live:
        for _ in range(100):
            torch.empty(1000, device=device)
    assert (live.live_bytes, live.peak_bytes) == (0, 4000)


@on_each_device
def test_in_place_work_and_given_outputs_take_nothing(device):
    out = torch.empty(1000, device=device)
    with LiveBytes() as live:
        kept = torch.zeros(1000, device=device)
        kept.mul_(2).add_(1)
        torch.add(kept, kept, out=out)
    assert live.peak_bytes == 4000


@on_each_device
def test_a_copy_to_another_dtype_counts_with_its_own_size(device):
    with LiveBytes() as live:
        small = torch.zeros(1000, dtype=torch.int8, device=device)
        wide = small.double()
        assert live.live_bytes == small.nbytes + wide.nbytes == 9000


def test_a_tensor_made_of_python_numbers_counts():
    with LiveBytes() as live:
        made = torch.tensor([1.0] * 1000)
    assert live.live_bytes == made.nbytes == 4000


def test_tensors_of_other_threads_do_not_count():
    with LiveBytes() as live:
        thread = threading.Thread(target=lambda: torch.zeros(1000))
        thread.start()
        thread.join()
    assert live.peak_bytes == 0


def test_results_are_unchanged():
    x, y = torch.randn(50, 60), torch.randn(60, 70)
    with LiveBytes():
        watched = torch.softmax(x @ y, dim=-1).sum(0)
    assert torch.equal(watched, torch.softmax(x @ y, dim=-1).sum(0))


steps = st.lists(
    st.tuples(st.sampled_from(["new", "view", "drop"]), st.integers(0, 500)), min_size=1, max_size=30
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(DEVICES), steps)
def test_live_and_peak_bytes_follow_any_sequence_of_steps(device, steps):
    """A model beside it: each tensor is a (storage, size) pair; storages live while a pair names them."""
    tensors: list[torch.Tensor] = []
    model: list[tuple[int, int]] = []
    peak = 0
    with LiveBytes() as live:
        for number, (step, value) in enumerate(steps):
            if step == "new":
                tensors.append(torch.empty(value, device=device))
                model.append((number, 4 * value))
            elif tensors:
                position = value % len(tensors)
                if step == "view":
                    tensors.append(tensors[position][value // 2 :])
                    model.append(model[position])
                else:
                    del tensors[position], model[position]
            expected = sum(dict(model).values())
            peak = max(peak, expected)
            assert (live.live_bytes, live.peak_bytes) == (expected, peak)
