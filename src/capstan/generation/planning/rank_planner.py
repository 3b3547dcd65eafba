"""Planning over several ranks: each plans its own layers within its own budgets, all for the same block.

Every rank says how long its layers would take for each block. A block's waves are at different ranks at the
same time, so that with enough of them the slowest rank sets the pace; the block with the best pace is taken,
and each rank places its layers for it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from capstan.errors import DoesNotFit, UsageError
from capstan.generation.planning.batching import BlockShape
from capstan.generation.planning.forecast import phases_of, play
from capstan.generation.planning.job_plan import Candidate, JobPlan, Task
from capstan.generation.planning.placement import Placement
from capstan.generation.planning.planner import FINALISTS, Planner
from capstan.generation.planning.stage import Capacity, Stage, divide, pipelined
from capstan.hardware import Link
from capstan.plans import Phase
from capstan.transport import Group

# Of the device, what is left for weights beside cache and buffers.
_WEIGHTS_SHARE = 0.7
_PROBE_BYTES = (1, 16 << 20)
_PROBE_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class RankPlanner(Planner):
    """Plans this rank's part of a model. All ranks must ask for the same plans in the same order."""

    stage: Stage

    def _job_s(self, planned: JobPlan) -> float:
        """The seconds of the slowest rank, so that all decide alike."""
        ranks: list[float] = self.stage.group.gather(super()._job_s(planned))
        return max(ranks)

    def _planned(self, job: Task) -> JobPlan:
        """The plan for this rank's layers.

        Raises:
            DoesNotFit: on every rank, if not even one sequence at a time fits on one of them; names it.
        """
        shapes = list(self._shapes(job))
        rough = [_fastest(self._rough_candidates_of(job, shape)) for shape in shapes]
        paces = self._paces_s(rough, shapes)
        finalists = sorted((pace, index) for index, pace in enumerate(paces) if pace < inf)
        best, best_s = None, inf
        for place, (_, index) in enumerate(finalists):
            if place >= FINALISTS and best is not None:
                break
            candidate = rough[index]
            assert candidate is not None
            exact = _fastest(self._exact_candidates(job, candidate))
            pace_s = self._paces_s([exact], [shapes[index]])[0]
            if pace_s < best_s:
                best, best_s = exact, pace_s
        if best is None:
            raise self._refusal(job, fits_here=any(rough))
        return self._job_plan(best, job)

    def _shapes(self, job: Task) -> Iterator[BlockShape]:
        for shape in super()._shapes(job):
            yield replace(shape, waves=min(self.stage.group.size, len(shape.batches)))

    def _paces_s(self, candidates: Sequence[Candidate | None], shapes: Sequence[BlockShape]) -> list[float]:
        """For each block, the seconds of the job over all ranks; infinite where it does not fit on one."""
        own = [None if candidate is None else candidate.seconds for candidate in candidates]
        ranks = self.stage.group.gather(own)
        return [
            inf if None in seconds else max(*seconds, sum(seconds) / shape.waves)
            for shape, seconds in zip(shapes, zip(*ranks, strict=True), strict=True)
        ]

    def _refusal(self, job: Task, *, fits_here: bool) -> DoesNotFit:
        own = None if fits_here else str(self._smallest_demand_error(job))
        reasons = self.stage.group.gather(own)
        told = [f"Rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
        return DoesNotFit(" ".join(told) or "No block fits on all ranks at once. Grant more memory.")

    def _phases(self, placement: Placement, shape: BlockShape, job: Task) -> tuple[Phase, ...]:
        """The job played on all ranks: a turn also takes what this rank waits for the others."""
        sweeps = list(
            play(self.model, placement, shape, job.lengths, self.rates, keeps_cache=job.keeps_cache)
        )
        seconds = self.stage.group.gather([sweep.seconds for sweep in sweeps])
        ends = pipelined(seconds, shape.waves)[self.stage.group.rank]
        starts = [0.0, *ends[:-1]]
        return phases_of(
            replace(sweep, seconds=end - start)
            for sweep, start, end in zip(sweeps, starts, ends, strict=True)
        )


def rank_planner(planner: Planner, group: Group, device: torch.device, *, probes: bool) -> RankPlanner:
    """`planner`, which knows the whole model, for this rank's layers only. All ranks must call it.

    The layers are divided so that the slowest rank reads its weights in the least time.
    `probes` measures the links between the ranks.
    """
    manifest = planner.model.manifest
    if manifest.num_layers < group.size:
        raise UsageError(
            f"{planner.model.folder} has {manifest.num_layers} layers, too few for {group.size} ranks."
        )
    sizes = [sum(each.stored_bytes for each in unit) for unit in manifest.units]
    capacities = [Capacity(*each) for each in group.gather(_capacity(planner))]
    run = divide(sizes[:-1], sizes[-1], capacities)[group.rank]
    stage = Stage(
        group=group,
        first=run.start,
        end=run.stop,
        num_layers=manifest.num_layers,
        links=_probed_links(group, device) if probes else (),
    )
    known = {name: getattr(planner, name) for name in planner.__dataclass_fields__}
    return RankPlanner(**known | {"model": planner.model.part(stage), "stage": stage})


def _capacity(planner: Planner) -> Capacity:
    machine, budgets = planner.machine, planner.budgets
    return Capacity(
        device_bytes=_WEIGHTS_SHARE * budgets["device"],
        host_bytes=_WEIGHTS_SHARE * budgets["host"],
        device_bytes_per_s=machine.device("device").memory_bandwidth_bytes_per_s,
        host_bytes_per_s=machine.link("host", "device").bandwidth_bytes_per_s,
        disk_bytes_per_s=machine.link("disk", "host").bandwidth_bytes_per_s,
    )


def _probed_links(group: Group, device: torch.device) -> tuple[Link, ...]:
    """The link from each rank to the next, measured one after the other."""
    own = None
    for source in range(group.size - 1):
        if group.rank == source:
            own = _probed(group, source, device)
        elif group.rank == source + 1:
            _echo(group, source, device)
        group.share(None)
    measured = group.gather(own)[:-1]
    return tuple(
        Link(
            source=f"rank {rank}", target=f"rank {rank + 1}", bandwidth_bytes_per_s=rate, latency_s=latency_s
        )
        for rank, (rate, latency_s) in enumerate(measured)
    )


def _probed(group: Group, source: int, device: torch.device) -> tuple[float, float]:
    """Bytes per second, and the seconds of the smallest message."""
    seconds = []
    for size in _PROBE_BYTES:
        payload, receipt, rounds = torch.zeros(size, dtype=torch.uint8, device=device), torch.zeros(1), []
        for _ in range(_PROBE_ROUNDS):
            started_s = time.perf_counter()
            group.send(payload, source + 1).wait()
            group.receive(receipt, source + 1).wait()
            rounds.append(time.perf_counter() - started_s)
        seconds.append(min(rounds))
    return _PROBE_BYTES[1] / max(seconds[1] - seconds[0], 1e-6), seconds[0] / 2


def _echo(group: Group, source: int, device: torch.device) -> None:
    for size in _PROBE_BYTES:
        payload = torch.zeros(size, dtype=torch.uint8, device=device)
        for _ in range(_PROBE_ROUNDS):
            group.receive(payload, source).wait()
            group.send(torch.zeros(1), source).wait()


def _fastest(candidates: Iterator[Candidate] | Sequence[Candidate]) -> Candidate | None:
    return min(candidates, key=lambda candidate: candidate.seconds, default=None)
