"""How fast is this machine? Plain facts about its memories, arithmetic and the links between them.

Every planner reads these values and nothing else about the hardware, so a plan can be made for a
machine that is not there: write its `Machine` by hand, or read it from JSON.

A probed machine has three tiers, named "device", "host" and "disk". Their kind is "cuda", "host" and
"disk"; where there is no accelerator the tier "device" has kind "cpu": a budgeted slice of host memory
plays the fast memory, and its links are copies from one buffer of host memory to another.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from capstan.errors import InputError, UsageError, unknown_name
from capstan.hardware.fields import Fields, parse_object
from capstan.hardware.units import gb_per_s, gib, short_time, tflop_per_s

FORMAT = "capstan.machine"
VERSION = 1
KINDS = ("cuda", "cpu", "host", "disk")


@dataclass(frozen=True, kw_only=True, repr=False)
class Device:
    """One place that holds bytes and may compute: an accelerator, host memory, or a disk.

    `memory_bytes` is what was free when it was measured, not what was sold.
    `matmul_flops_per_s` is keyed by dtype name ("float32", "bfloat16", "float16"); a dtype that does
    not run there is absent. `memory_bandwidth_bytes_per_s` is the rate at which its own memory is read,
    which bounds attention over a cache that lies there; for a disk it is the sequential read rate.
    `identity` says which one it is: the product's name, or the folder that a disk was measured in.
    """

    name: str
    kind: str
    memory_bytes: int
    matmul_flops_per_s: Mapping[str, float] = field(default_factory=dict, hash=False)
    memory_bandwidth_bytes_per_s: float
    identity: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of device", self.kind, KINDS)
        if self.memory_bytes < 0:
            raise UsageError(f"Device {self.name!r} has {self.memory_bytes} bytes of memory; give 0 or more.")
        _require_rate(f"memory bandwidth of {self.name!r}", self.memory_bandwidth_bytes_per_s)
        for dtype, rate in self.matmul_flops_per_s.items():
            _require_rate(f"{dtype} matmul rate of {self.name!r}", rate)
        # A copy, so that nobody who keeps the caller's dict can change a frozen value.
        object.__setattr__(self, "matmul_flops_per_s", dict(self.matmul_flops_per_s))

    def __repr__(self) -> str:
        rates = [f"{dtype} {tflop_per_s(rate)}" for dtype, rate in self.matmul_flops_per_s.items()]
        memory = f"{gib(self.memory_bytes)} free at {gb_per_s(self.memory_bandwidth_bytes_per_s)}"
        return f"Device({', '.join([self.name, self.kind, memory, *rates])})"


@dataclass(frozen=True, kw_only=True, repr=False)
class Link:
    """One direction of a way between two places.

    `bandwidth_bytes_per_s` is the best sustained rate: pinned memory for an accelerator, direct I/O for
    a disk. `pageable_bandwidth_bytes_per_s` is the rate from or to ordinary memory, and
    `duplex_bandwidth_bytes_per_s` the rate of this direction while the opposite one runs too; None
    where the difference does not exist or was not measured.
    """

    source: str
    target: str
    bandwidth_bytes_per_s: float
    latency_s: float
    pageable_bandwidth_bytes_per_s: float | None = None
    duplex_bandwidth_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        where = f"{self.source} -> {self.target}"
        _require_rate(f"bandwidth of {where}", self.bandwidth_bytes_per_s)
        for rate in (self.pageable_bandwidth_bytes_per_s, self.duplex_bandwidth_bytes_per_s):
            if rate is not None:
                _require_rate(f"bandwidth of {where}", rate)
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise UsageError(
                f"The latency of {where} is {self.latency_s} s; give 0 or a finite time above it."
            )

    def seconds(self, size_bytes: float) -> float:
        """The time that one transfer of `size_bytes` takes; nothing at all for no bytes.

        seconds = latency_s + size_bytes / bandwidth_bytes_per_s
        """
        if not size_bytes >= 0:
            raise UsageError(f"A transfer of {size_bytes} bytes does not exist; give 0 or more.")
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s if size_bytes else 0.0

    def __repr__(self) -> str:
        rate, latency = gb_per_s(self.bandwidth_bytes_per_s), short_time(self.latency_s)
        return f"Link({self.source} -> {self.target}, {rate}, {latency})"


@dataclass(frozen=True, kw_only=True, repr=False)
class Machine:
    """The devices of one machine, the links between them, and when and with what they were measured."""

    name: str
    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    cores: int
    probed_at: str
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        object.__setattr__(self, "links", tuple(self.links))
        object.__setattr__(self, "versions", dict(self.versions))
        object.__setattr__(self, "notes", tuple(self.notes))
        _require_distinct("device", [device.name for device in self.devices])
        _require_distinct("link", [_arrow(link.source, link.target) for link in self.links])
        for end in {end for link in self.links for end in (link.source, link.target)}:
            self.device(end)
        if self.cores < 1:
            raise UsageError(f"Machine {self.name!r} has {self.cores} cores; give 1 or more.")
        _require_date(self.probed_at)

    def device(self, name: str) -> Device:
        """The device of that name: "device", "host" or "disk" on a probed machine."""
        for device in self.devices:
            if device.name == name:
                return device
        raise unknown_name("device", name, [device.name for device in self.devices])

    def link(self, source: str, target: str) -> Link:
        """The link in that direction; the opposite direction is another link."""
        for link in self.links:
            if (link.source, link.target) == (source, target):
                return link
        known = [_arrow(link.source, link.target) for link in self.links]
        raise unknown_name("link", _arrow(source, target), known)

    def as_dict(self) -> dict[str, Any]:
        """The machine as plain data: what `to_json` writes."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "probed_at": self.probed_at,
            "cores": self.cores,
            "devices": [asdict(device) for device in self.devices],
            "links": [asdict(link) for link in self.links],
            "versions": dict(self.versions),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """One JSON object; `Machine.from_json` gives back an equal machine."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "the machine profile") -> "Machine":
        """The machine that `to_json` wrote. `source` names the text in errors."""
        return cls.from_dict(parse_object(text, source=source), source=source)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], *, source: str = "the machine profile") -> "Machine":
        """The machine that `as_dict` described; every field is checked, unknown ones are refused."""
        fields = Fields(record, source)
        fields.require_format(FORMAT, VERSION)
        try:
            return _machine_of(fields)
        except UsageError as error:
            raise InputError(f"{source} describes no possible machine. {error}") from error

    def __repr__(self) -> str:
        tiers = [f"{device.name} ({device.kind}) {gib(device.memory_bytes)}" for device in self.devices]
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        return f"Machine({self.name}: {', '.join([*tiers, cores])}, probed {self.probed_at})"


def _machine_of(fields: Fields) -> Machine:
    machine = Machine(
        name=fields.text("name"),
        probed_at=fields.text("probed_at"),
        cores=fields.integer("cores"),
        devices=tuple(_device_of(device) for device in fields.objects("devices")),
        links=tuple(_link_of(link) for link in fields.objects("links")),
        versions=fields.texts_by_name("versions"),
        notes=fields.texts("notes"),
    )
    fields.require_no_more()
    return machine


def _device_of(fields: Fields) -> Device:
    device = Device(
        name=fields.text("name"),
        kind=fields.text("kind"),
        memory_bytes=fields.integer("memory_bytes"),
        matmul_flops_per_s=fields.numbers_by_name("matmul_flops_per_s"),
        memory_bandwidth_bytes_per_s=fields.number("memory_bandwidth_bytes_per_s"),
        identity=fields.text("identity"),
    )
    fields.require_no_more()
    return device


def _link_of(fields: Fields) -> Link:
    link = Link(
        source=fields.text("source"),
        target=fields.text("target"),
        bandwidth_bytes_per_s=fields.number("bandwidth_bytes_per_s"),
        latency_s=fields.number("latency_s"),
        pageable_bandwidth_bytes_per_s=fields.number_or_none("pageable_bandwidth_bytes_per_s"),
        duplex_bandwidth_bytes_per_s=fields.number_or_none("duplex_bandwidth_bytes_per_s"),
    )
    fields.require_no_more()
    return link


def _arrow(source: str, target: str) -> str:
    return f"{source} -> {target}"


def _require_rate(what: str, rate: float) -> None:
    if not (math.isfinite(rate) and rate > 0):
        raise UsageError(f"The {what} is {rate}; give a finite rate above 0.")


def _require_distinct(kind: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"A machine names each {kind} once, but these come twice: {', '.join(twice)}.")


def _require_date(text: str) -> None:
    try:
        datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"probed_at is {text!r}; give an ISO date such as 2026-11-23.") from error
