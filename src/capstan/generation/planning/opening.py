"""Opening: from a folder, budgets and rates to a planner; no weight is read."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch

from capstan.errors import DeviceError, InputError, UsageError
from capstan.generation.attention.host_attention import reading_rate
from capstan.generation.model import open_model
from capstan.generation.planning.placement import Tier, parse_wish
from capstan.generation.planning.planner import Planner
from capstan.generation.planning.rank_planner import rank_planner
from capstan.hardware import Machine, this_machine
from capstan.models.decoded_checkpoint import dominant_dtype, open_checkpoint
from capstan.models.refusals import refuse_other_models
from capstan.plans import parse_bytes
from capstan.storage import Checkpoint
from capstan.transport import Group
from capstan.transport.group import join


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
    share_prefixes: bool | None = None,
    machine: Machine | None = None,
    checkpoint: Checkpoint | None = None,
    group: Group | Literal["auto"] | None = None,
) -> tuple[Planner, torch.device]:
    """A planner for a model folder, without reading a weight; the arguments are those of `Engine.open`.

    In a group of several ranks it is for this rank's layers.
    """
    ranks = join(_device(device).type) if group == "auto" else group
    torch_device = _device(device)
    here = _ranks_here(ranks)
    probed = _probed(torch_device.type, ranks, here) if machine is None else None
    machine = machine or probed
    assert machine is not None
    checkpoint = checkpoint or open_checkpoint(_language_model(Path(folder)))
    dtype = dtype or _fastest_dtype(dominant_dtype(checkpoint), machine)
    if ranks is not None:  # the first rank's choice: one model is computed in one dtype
        dtype = getattr(torch, ranks.share(str(dtype).removeprefix("torch.")))
    model = open_model(
        Path(folder),
        device_type=torch_device.type,
        dtype=dtype,
        weight_bits=weight_bits,
        cache_bits=cache_bits,
        checkpoint=checkpoint,
    )
    scratch = Path(disk) if disk else None
    budgets = _budgets(machine, torch_device, device_memory, host_memory, scratch, sharing=len(here))
    rate = None if probed is None else min(reading_rate(layout) for layout in set(model.formats))
    planner = Planner(
        model=model,
        machine=machine,
        budgets=budgets,
        wish=parse_wish(place),
        shares_prefixes=share_prefixes,
        host_attention_bytes_per_s=rate,
    )
    if ranks is not None:
        planner = rank_planner(planner, ranks, torch_device, probes=probed is not None)
    return planner, torch_device


def _ranks_here(group: Group | None) -> list[int]:
    """The ranks on this machine, which share its host memory."""
    if group is None:
        return [0]
    names = group.gather(socket.gethostname())
    return [rank for rank, name in enumerate(names) if name == names[group.rank]]


def _probed(device_type: str, group: Group | None, here: list[int]) -> Machine:
    """This machine's profile; of several ranks on it, one probes while the others wait."""
    if group is None:
        return this_machine(device=device_type)
    if group.rank == here[0]:
        this_machine(device=device_type)
    group.gather(None)
    return this_machine(device=device_type)


def _language_model(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Name a folder with a model in Hugging Face format.")
    refuse_other_models(folder)
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
    *,
    sharing: int = 1,
) -> dict[Tier, int]:
    host_free = machine.device("host").memory_bytes / sharing
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
        budgets["disk"] = psutil.disk_usage(str(existing)).free // sharing
    return budgets
