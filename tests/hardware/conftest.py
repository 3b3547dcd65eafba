"""A machine that needs no measuring, for the tests that are not about measuring."""

from pathlib import Path

import pytest

from capstan.hardware import Device, Link, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    memory = {"memory_bytes": 8 * 2**30, "memory_bandwidth_bytes_per_s": 20e9}
    return Machine(
        name="atlas",
        devices=(
            Device(name="device", kind="cpu", matmul_flops_per_s={"float32": 1e11}, **memory),
            Device(name="host", kind="host", matmul_flops_per_s={"float32": 1e11}, **memory),
            Device(
                name="disk",
                kind="disk",
                memory_bytes=2**40,
                memory_bandwidth_bytes_per_s=1e9,
                identity=str(tmp_path),
            ),
        ),
        links=(
            Link(source="host", target="device", bandwidth_bytes_per_s=10e9, latency_s=1e-6),
            Link(source="device", target="host", bandwidth_bytes_per_s=5e9, latency_s=2e-6),
            Link(source="disk", target="host", bandwidth_bytes_per_s=1e9, latency_s=1e-4),
            Link(source="host", target="disk", bandwidth_bytes_per_s=5e8, latency_s=1e-4),
        ),
        cores=2,
        probed_at="2026-11-23",
        versions={"torch": "2.13.0"},
        notes=("a note",),
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, which does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CAPSTAN_CACHE", str(folder))
    return folder
