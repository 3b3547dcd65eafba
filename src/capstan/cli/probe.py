"""`capstan probe`: how fast are this machine's memories, processors, links and disk?"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from capstan.hardware.machine import Device, Link, Machine
from capstan.hardware.probe_machine import DEFAULT_BUDGET_S
from capstan.hardware.profile import profile_path, this_machine
from capstan.hardware.units import gb_per_s, gib, short_time, tflop_per_s

DeviceOption = Annotated[
    str,
    typer.Option(
        help="What plays the fast memory: 'cuda' is an NVIDIA accelerator, 'cpu' a slice of host memory "
        "(useful to try a plan anywhere), 'auto' is cuda where there is one."
    ),
]
DiskOption = Annotated[
    Path | None,
    typer.Option(
        help="A folder on the disk to measure, best the one that offloaded weights will lie in. "
        "The default is Capstan's cache folder. A temporary file is written there and removed."
    ),
]
SecondsOption = Annotated[
    float,
    typer.Option(
        min=0.5,
        max=600.0,
        help="How long to measure. Longer gives larger buffers, files and matrices and steadier figures; "
        "4 is enough for a first plan. Importing torch comes on top.",
    ),
]
CachedOption = Annotated[
    bool,
    typer.Option("--cached", help="Show the kept profile, if there is one, with free memory as of now."),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on standard output, for programs, and no table."),
]


def probe(
    device: DeviceOption = "auto",
    disk: DiskOption = None,
    seconds: SecondsOption = DEFAULT_BUDGET_S,
    cached: CachedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine moves bytes and multiplies matrices, and keep the result.

    Every plan of Capstan predicts its time from these figures, which are kept in a profile. Leave the
    machine idle meanwhile.
    """
    errors = Console(stderr=True)
    measured: list[str] = []
    with _progress_line(errors, measured) as progress:
        machine = this_machine(
            device=device, fresh=not cached, budget_s=seconds, disk_dir=disk, progress=progress
        )
    if not measured:
        errors.print("Read from the profile; only free memory is new.")
    path = profile_path(machine.device("device").kind)
    kept = str(path) if path.exists() else None
    if as_json:
        typer.echo(json.dumps({"verb": "probe", "profile": kept, "machine": machine.as_dict()}))
    else:
        _print_machine(machine, kept)


@contextmanager
def _progress_line(errors: Console, measured: list[str]) -> Iterator[Callable[[str], None]]:
    """One line on standard error that says what is being measured; nothing when it is no terminal.

    Everything that is announced is also put into `measured`.
    """
    if not errors.is_terminal:
        yield measured.append
        return
    with errors.status("waking up") as status:

        def tell(line: str) -> None:
            measured.append(line)
            status.update(f"measuring {escape(line)}")

        yield tell


def _print_machine(machine: Machine, profile: str | None) -> None:
    output = Console()
    cores = f"{machine.cores} core{'s' if machine.cores > 1 else ''}"
    output.print(f"{machine.name} · {cores} · measured on {machine.probed_at}", markup=False)
    output.print(_device_table(machine.devices))
    output.print(_link_table(machine.links))
    for note in machine.notes:
        output.print(f"- {note}", markup=False)
    kept = f"Kept in {profile}" if profile else "The profile could not be kept"
    output.print(f"{kept}; see it again with: capstan probe --cached", markup=False)


def _device_table(devices: tuple[Device, ...]) -> Table:
    dtypes = list(dict.fromkeys(dtype for device in devices for dtype in device.matmul_flops_per_s))
    table = Table("device", Column("is", overflow="fold"), "free", "reads", *dtypes)
    for device in devices:
        rates = device.matmul_flops_per_s
        table.add_row(
            device.name,
            escape(f"{device.kind}: {device.identity}" if device.identity else device.kind),
            gib(device.memory_bytes),
            gb_per_s(device.memory_bandwidth_bytes_per_s),
            *(tflop_per_s(rates[dtype]) if dtype in rates else "-" for dtype in dtypes),
        )
    return table


def _link_table(links: tuple[Link, ...]) -> Table:
    table = Table("link", "rate", "pageable", "both ways at once", "latency")
    for link in links:
        table.add_row(
            f"{link.source} -> {link.target}",
            gb_per_s(link.bandwidth_bytes_per_s),
            _rate_or_dash(link.pageable_bandwidth_bytes_per_s),
            _rate_or_dash(link.duplex_bandwidth_bytes_per_s),
            short_time(link.latency_s),
        )
    return table


def _rate_or_dash(rate: float | None) -> str:
    return "-" if rate is None else gb_per_s(rate)
