"""What a job was seen to take, and how far it is."""

from collections.abc import Callable
from dataclasses import dataclass, field

from capstan.plans import Phase


@dataclass
class Measured:
    """What a job's sweeps were seen to take, phase by phase."""

    phases: dict[str, Phase] = field(default_factory=dict)
    workspace_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, phase: Phase) -> None:
        """Add a sweep to its phase."""
        known = self.phases.get(phase.name)
        if known is not None:
            busy_s = {
                name: known.busy_s.get(name, 0.0) + phase.busy_s.get(name, 0.0)
                for name in {*known.busy_s, *phase.busy_s}
            }
            phase = Phase(
                name=phase.name,
                seconds=known.seconds + phase.seconds,
                busy_s=busy_s,
                traffic=known.traffic + phase.traffic,
                counts={unit: known.counts.get(unit, 0) + n for unit, n in phase.counts.items()},
            )
        self.phases[phase.name] = phase


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is; handed to the caller after every sweep."""

    num_sequences: int
    num_finished: int
    num_generated: int
    num_sweeps: int
    num_running: int
    seconds: float


OnProgress = Callable[[Progress], None]
