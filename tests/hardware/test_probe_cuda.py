"""What only an NVIDIA device can show. Needs neither pydantic nor hypothesis."""

from pathlib import Path

import pytest

from capstan.hardware.machine import Machine
from capstan.hardware.probe_machine import probe

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return probe(device="cuda", disk_dir=tmp_path_factory.mktemp("disk"), budget_s=10.0)


def test_the_device_is_measured_in_every_dtype(machine: Machine) -> None:
    device = machine.device("device")
    assert device.kind == "cuda"
    assert device.identity
    assert device.memory_bytes > 0
    assert set(device.matmul_flops_per_s) >= {"float32", "float16"}
    assert machine.versions["cuda"]


@pytest.mark.parametrize("ends", [("host", "device"), ("device", "host")])
def test_each_direction_is_measured_pinned_pageable_and_duplex(
    machine: Machine, ends: tuple[str, str]
) -> None:
    link = machine.link(*ends)
    assert link.pageable_bandwidth_bytes_per_s is not None
    assert link.duplex_bandwidth_bytes_per_s is not None
    assert link.latency_s > 0
    assert not any("refused to pin" in note for note in machine.notes)


def test_a_buffer_is_pinned_only_for_the_duration() -> None:
    from capstan.hardware.probe_cuda import pinned
    from capstan.hardware.probe_memory import host_buffer

    buffer = host_buffer(3 * 2**20)
    with pinned(buffer) as done:
        assert done
        assert buffer.is_pinned()
    assert not buffer.is_pinned()


def test_probing_gives_device_memory_back_and_changes_no_random_numbers(tmp_path: Path) -> None:
    import torch

    torch.ones(1, device="cuda")
    state = torch.cuda.get_rng_state()
    reserved = torch.cuda.memory_reserved()
    probe(device="cuda", disk_dir=tmp_path, budget_s=1.0)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    # cuBLAS keeps a workspace of some MiB once it has been used.
    assert torch.cuda.memory_reserved() <= reserved + 256 * 2**20


def test_a_machine_of_this_device_goes_through_json(machine: Machine) -> None:
    assert Machine.from_json(machine.to_json()) == machine
