import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capstan.errors import DeviceError, MissingExtra, UsageError
from capstan.hardware import Machine, probe
from capstan.hardware.probe_machine import _busy_notes
from capstan.hardware.probe_matmul import matmul_rates
from capstan.hardware.time_slice import TimeSlice


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, list[str], Path]:
    folder = tmp_path_factory.mktemp("disk")
    lines: list[str] = []
    return probe(device="cpu", disk_dir=folder, budget_s=1.0, progress=lines.append), lines, folder


def test_every_tier_and_link_is_measured(probed: tuple[Machine, list[str], Path]) -> None:
    machine = probed[0]
    assert [device.name for device in machine.devices] == ["device", "host", "disk"]
    assert [device.kind for device in machine.devices] == ["cpu", "host", "disk"]
    for device in machine.devices:
        assert device.memory_bytes > 0
    for source, target in (("host", "device"), ("device", "host"), ("disk", "host"), ("host", "disk")):
        assert machine.link(source, target).latency_s > 0
    assert machine.device("device").matmul_flops_per_s["float32"] > 0
    assert machine.link("host", "device").duplex_bandwidth_bytes_per_s is not None
    assert machine.cores >= 1


def test_a_probed_machine_goes_through_json(probed: tuple[Machine, list[str], Path]) -> None:
    assert Machine.from_json(probed[0].to_json()) == probed[0]


def test_the_notes_say_that_host_memory_plays_the_device(probed: tuple[Machine, list[str], Path]) -> None:
    assert any("host memory plays the device" in note for note in probed[0].notes)


def test_progress_announces_what_is_measured(probed: tuple[Machine, list[str], Path]) -> None:
    assert any("float32" in line for line in probed[1])
    assert probed[1][-1] == f"disk under {probed[2]}"


def test_the_folder_is_left_empty(probed: tuple[Machine, list[str], Path]) -> None:
    assert os.listdir(probed[2]) == []
    assert probed[0].device("disk").identity == str(probed[2].resolve())


def test_probing_changes_neither_random_numbers_nor_threads() -> None:
    import torch

    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    matmul_rates("cpu", 2**30, TimeSlice(0.01), lambda line: None)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_dtype_that_cannot_be_multiplied_is_absent_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    original = torch.mm

    def without_half(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return original(left, right, out=out)

    monkeypatch.setattr(torch, "mm", without_half)
    rates = matmul_rates("cpu", 2**30, TimeSlice(0.01), lambda line: None)
    assert set(rates.flops_per_s) == {"float32", "bfloat16"}
    assert "Matrices of float16 cannot be multiplied on cpu here." in rates.notes


def test_matrices_take_at_most_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    original, largest = torch.mm, 0

    def watched(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(left))
        return original(left, right, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    matmul_rates("cpu", 2 * 4 * 4 * 128**2, TimeSlice(0.5), lambda line: None)
    assert largest == 128


def test_any_other_fault_of_a_product_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "mm", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        matmul_rates("cpu", 2**30, TimeSlice(0.01), lambda line: None)


def test_a_busy_machine_is_noted_and_an_idle_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    assert "busy (load 3.0 on 4 cores)" in _busy_notes(4)[0]
    assert _busy_notes(8) == ()


def test_cuda_that_is_not_there_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"finds none here\. Use --device cpu"):
        probe(device="cuda")


def test_an_unknown_device_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no device 'cudda'. Did you mean 'cuda'"):
        probe(device="cudda")


@pytest.mark.parametrize("budget_s", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_is_no_time_is_refused(budget_s: float) -> None:
    with pytest.raises(UsageError, match="finite number of seconds"):
        probe(device="cpu", budget_s=budget_s)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"capstan-ml\[torch\]"):
        probe(device="cpu", disk_dir=tmp_path)


def test_importing_the_room_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pydantic", "yaml", "psutil")
    script = f"import sys, capstan.hardware; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
