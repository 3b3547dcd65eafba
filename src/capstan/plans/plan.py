"""Plan and trace: the same fields, predicted and measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from capstan.errors import InputError
from capstan.plans.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One decision of a planner, and why it was taken."""

    name: str
    value: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """What a planner could have chosen instead, what it would cost, and why it did not."""

    name: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of work: how long it takes, how busy each resource is, what crosses each link.

    `seconds` is wall time. `busy_s` maps a resource (a link such as `"host->device"`, or a unit such as
    `"device compute"`) to the seconds it works; resources may work side by side. `counts` says how much
    work it is, by unit: `{"tokens": 512}`, `{"samples": 60_000}`, `{"rows": 4096}`.
    """

    name: str
    seconds: float
    busy_s: Mapping[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    counts: Mapping[str, int] = field(default_factory=dict)

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
            "counts": dict(self.counts),
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        """The phase that `to_dict` told of."""
        return cls(
            name=told["name"],
            seconds=told["seconds"],
            busy_s=dict(told["busy_s"]),
            traffic=Traffic.from_dict(told["bytes"]),
            counts=dict(told["counts"]),
        )


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

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        """The account that `to_dict` told of; totals are computed anew.

        Raises:
            InputError: a field is missing or is not what it should be.
        """
        try:
            return cls(**cls._fields(told))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"This is not a {cls.__name__.lower()} as Capstan writes it: {type(error).__name__}: {error}."
            ) from error

    @classmethod
    def _fields(cls, told: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "system": told["system"],
            "title": told["title"],
            "machine": told["machine"],
            "phases": tuple(map(Phase.from_dict, told["phases"])),
            "peak_bytes": dict(told["peak_bytes"]),
        }


@dataclass(frozen=True, kw_only=True)
class Plan(_Account):
    """What a piece of work will cost, before it runs.

    `budget_bytes` is what each device was granted, `peak_bytes` what the plan will use at most. `decision`
    is what the room carries out, in its own words and fit for JSON; `bound` names the physical limit that
    binds; `alternatives` are what else was weighed, with its price.
    """

    choices: tuple[Choice, ...] = ()
    budget_bytes: Mapping[str, int] = field(default_factory=dict)
    decision: Mapping[str, Any] = field(default_factory=dict)
    bound: str = ""
    alternatives: tuple[Alternative, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "budget_bytes": dict(self.budget_bytes),
            "choices": [asdict(choice) for choice in self.choices],
            "decision": dict(self.decision),
            "bound": self.bound,
            "alternatives": [asdict(alternative) for alternative in self.alternatives],
        }

    @classmethod
    def _fields(cls, told: Mapping[str, Any]) -> dict[str, Any]:
        return super()._fields(told) | {
            "budget_bytes": dict(told["budget_bytes"]),
            "choices": tuple(Choice(**each) for each in told["choices"]),
            "decision": dict(told["decision"]),
            "bound": told["bound"],
            "alternatives": tuple(Alternative(**each) for each in told["alternatives"]),
        }


@dataclass(frozen=True, kw_only=True)
class Trace(_Account):
    """What a piece of work did cost: the fields of its plan, measured."""

    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"notes": list(self.notes)}

    @classmethod
    def _fields(cls, told: Mapping[str, Any]) -> dict[str, Any]:
        return super()._fields(told) | {"notes": tuple(told["notes"])}
