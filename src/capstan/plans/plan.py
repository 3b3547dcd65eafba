"""Plan and trace: the same fields, predicted and measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from capstan.plans.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One decision of a planner, and why it was taken."""

    name: str
    value: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of work: how long it takes, how busy each resource is, what crosses each link.

    `seconds` is wall time. `busy_s` maps a resource (a link such as `"host->device"`, or a unit such as
    `"device compute"`) to the seconds it works; resources may work side by side.
    """

    name: str
    seconds: float
    busy_s: Mapping[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    num_tokens: int = 0

    @property
    def bottleneck(self) -> str | None:
        """The resource that is busy longest."""
        return max(self.busy_s, key=lambda name: self.busy_s[name]) if self.busy_s else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seconds": self.seconds,
            "busy_s": dict(self.busy_s),
            "bytes": self.traffic.to_dict(),
            "num_tokens": self.num_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class _Account:
    """What a plan and a trace have in common."""

    system: str
    title: str
    machine: str
    phases: tuple[Phase, ...] = ()
    peak_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time of all phases, one after the other."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def traffic(self) -> Traffic:
        """Bytes of all phases."""
        return Traffic.total(phase.traffic for phase in self.phases)

    def phase(self, name: str) -> Phase | None:
        """The phase called `name`, if there is one."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "system": self.system,
            "title": self.title,
            "machine": self.machine,
            "seconds": self.seconds,
            "phases": [phase.to_dict() for phase in self.phases],
            "bytes": self.traffic.to_dict(),
            "peak_bytes": dict(self.peak_bytes),
        }


@dataclass(frozen=True, kw_only=True)
class Plan(_Account):
    """What a piece of work will cost, before it runs.

    `budget_bytes` is what each device was granted, `peak_bytes` what the plan will use at most.
    """

    choices: tuple[Choice, ...] = ()
    budget_bytes: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "budget_bytes": dict(self.budget_bytes),
            "choices": [
                {"name": choice.name, "value": choice.value, "reason": choice.reason}
                for choice in self.choices
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Trace(_Account):
    """What a piece of work did cost: the fields of its plan, measured."""

    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"notes": list(self.notes)}
