"""Opening a model: where it will compute, in what, within which budgets; no weight is read."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from capstan.errors import DeviceError, InputError, UsageError
from capstan.generation.host_attention import reading_rate
from capstan.generation.model import dominant_dtype, open_model
from capstan.generation.placement import Tier, parse_wish
from capstan.generation.planner import Planner
from capstan.hardware import Machine, this_machine
from capstan.plans import parse_bytes
from capstan.storage import Checkpoint


def plan_for(
    folder: str | Path,
    *,
    device: str = "auto",
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    disk: str | Path | None = None,
    weight_bits: int | None = None,
    cache_bits: int | None = None,
    place: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    share_prefixes: bool = True,
    machine: Machine | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Planner, torch.device]:
    """A planner for a model folder, without reading a weight; the arguments are those of `Engine.open`."""
    torch_device = _device(device)
    probed = this_machine(device=torch_device.type) if machine is None else None
    machine = machine or probed
    assert machine is not None
    checkpoint = checkpoint or Checkpoint(_existing(Path(folder)))
    model = open_model(
        Path(folder),
        device_type=torch_device.type,
        dtype=dtype or _fastest_dtype(dominant_dtype(checkpoint), machine),
        weight_bits=weight_bits,
        cache_bits=cache_bits,
        checkpoint=checkpoint,
    )
    budgets = _budgets(machine, torch_device, device_memory, host_memory, Path(disk) if disk else None)
    rate = None if probed is None else min(reading_rate(layout) for layout in set(model.formats))
    planner = Planner(
        model=model,
        machine=machine,
        budgets=budgets,
        wish=parse_wish(place),
        shares_prefixes=share_prefixes,
        host_attention_bytes_per_s=rate,
    )
    return planner, torch_device


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Name a folder with a model in Hugging Face format.")
    return folder


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UsageError(f"The device is 'cuda', 'cpu' or 'auto', not {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda was asked for, but torch sees no CUDA device. Use --device cpu.")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def _fastest_dtype(stored: torch.dtype, machine: Machine) -> torch.dtype:
    """float32 where the device multiplies it faster than the checkpoint's narrower dtype: many processors
    do, and it loses nothing."""
    rates = machine.device("device").matmul_flops_per_s
    name = str(stored).removeprefix("torch.")
    return torch.float32 if rates.get("float32", 0.0) > rates.get(name, 0.0) else stored


def _budgets(
    machine: Machine,
    device: torch.device,
    device_memory: str | int | None,
    host_memory: str | int | None,
    disk: Path | None,
) -> dict[Tier, int]:
    host_free = machine.device("host").memory_bytes
    if device.type == "cuda":
        shares = (0.9 * machine.device("device").memory_bytes, 0.8 * host_free)
    else:  # the two share one memory
        shares = (0.5 * host_free, 0.3 * host_free)
    budgets: dict[Tier, int] = {
        "device": parse_bytes(device_memory) if device_memory is not None else int(shares[0]),
        "host": parse_bytes(host_memory) if host_memory is not None else int(shares[1]),
        "disk": 0,
    }
    if disk is not None:
        existing = next(parent for parent in (disk, *disk.absolute().parents) if parent.exists())
        budgets["disk"] = psutil.disk_usage(str(existing)).free
    return budgets
