"""Plan and trace of one rank's training: the same phases, by formula and by clock and ledger."""

import atexit
import itertools
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from capstan.data_parallel.accounts import Member, pass_traffic, sharing_traffic, step_traffic
from capstan.data_parallel.buckets import Bucket
from capstan.data_parallel.planner import COMPUTE, LINK, Network, Workload, predict
from capstan.data_parallel.qadam import QAdam
from capstan.plans import Choice, Phase, Plan, Trace, Traffic
from capstan.storage import write_atomically

if TYPE_CHECKING:
    from capstan.data_parallel.replica import Replica

RECORD_VARIABLE = "CAPSTAN_DATA_PARALLEL_RECORD"
"""Where `capstan train dp --json` wants each rank's accounts, and what it knows of the network; as JSON."""


_numbers = itertools.count()


class Recorder:
    """Counts and times a rank's training."""

    def __init__(self, replica: "Replica") -> None:
        self._replica, self.group = replica, replica.group
        self.number = next(_numbers)
        self.forwards = self.passes = self.steps = 0
        self.steps_before = 0  # taken before a state was loaded
        self._made_s = time.monotonic()
        self._first_s = self._last_s = self._made_s
        self._start = Traffic()
        self._start_s = 0.0

    def has_started(self) -> None:
        """All ranks have the same weights."""
        self._start = self._replica.ledger.traffic
        self._first_s = self._last_s = time.monotonic()
        self._start_s = self._first_s - self._made_s

    def count(self, *, forwards: int = 0, passes: int = 0, steps: int = 0) -> None:
        """Something has ended: forward passes that shared buffers, backward passes that exchanged, steps."""
        self.forwards, self.passes = self.forwards + forwards, self.passes + passes
        self.steps += steps
        self._last_s = time.monotonic()

    def trace(self) -> Trace:
        """What has crossed and how long it took, until now."""
        training = self._replica.ledger.traffic - self._start
        seconds = self._last_s - self._first_s
        return Trace(
            system="data_parallel",
            title=self._title,
            machine=self._machine,
            phases=(
                Phase(name="start", seconds=self._start_s, traffic=self._start),
                Phase(
                    name="training",
                    seconds=seconds,
                    traffic=training,
                    counts={"steps": self.steps, "backward passes": self.passes},
                ),
            ),
        )

    def plan(
        self,
        steps: int,
        *,
        network: Network,
        compute_s: float,
        passes: int | None = None,
        forwards: int | None = None,
    ) -> Plan:
        """See `Replica.plan`."""
        if not self._replica.algorithm.exchanges_gradients:
            passes = 0
        passes = steps if passes is None else passes
        forwards = passes if forwards is None else forwards
        replica, member = self._replica, Member(self.group.rank, self.group.size)
        buckets = replica.gradient_buckets() or replica.weight_buckets()
        elements = tuple(bucket.flat.numel() for bucket in buckets)
        work = Workload(bucket_elements=elements, forward_s=compute_s / 3, backward_s=2 * compute_s / 3)
        sent = f"rank {member.rank}->"
        start = sharing_traffic(member, (*replica.module.parameters(), *replica.module.buffers()))
        traffic = forwards * sharing_traffic(member, replica.shared_buffers())
        traffic += self._traffic(member, buckets, steps, passes)
        return Plan(
            system="data_parallel",
            title=self._title,
            machine=self._machine,
            phases=(
                _phase("start", start, seconds=network.latency_s, sent=sent, network=network),
                _phase(
                    "training",
                    traffic,
                    seconds=steps * predict(replica.algorithm, work, network).step_s,
                    sent=sent,
                    network=network,
                    compute_s=steps * compute_s,
                    counts={"steps": steps, "backward passes": passes},
                ),
            ),
            choices=(Choice(name="algorithm", value=replica.algorithm.description),),
            decision={"algorithm": replica.algorithm.name, "ranks": member.size},
        )

    def _traffic(self, member: Member, buckets: list[Bucket], steps: int, passes: int) -> Traffic:
        algorithm, optimizer = self._replica.algorithm, self._replica.optimizer
        numbers = range(self.steps_before, self.steps_before + steps)
        warmup_steps = optimizer.warmup_steps if isinstance(optimizer, QAdam) else math.inf
        frozen = [number >= warmup_steps for number in numbers]
        frozen_passes = passes * sum(frozen) // max(1, steps)
        averaged = pass_traffic(algorithm, member, buckets)
        voted = pass_traffic(algorithm, member, buckets, is_frozen=frozen_passes > 0)
        moved = (
            step_traffic(algorithm, member, buckets, number, is_frozen=is_frozen)
            for number, is_frozen in zip(numbers, frozen, strict=True)
        )
        passed = ((passes - frozen_passes) * averaged, frozen_passes * voted)
        return Traffic.total((*passed, *moved))

    @property
    def _title(self) -> str:
        count = sum(each.numel() for each in self._replica.parameters())
        return f"{count:,} parameters, {self._replica.algorithm.description}"

    @property
    def _machine(self) -> str:
        return f"rank {self.group.rank} of {self.group.size}"


def record_at_the_end(recorder: Recorder) -> None:
    """Where `capstan train dp --json` has started this process, write plan and trace when it ends."""
    wanted = os.environ.get(RECORD_VARIABLE)
    if wanted:
        atexit.register(_write, recorder, **json.loads(wanted))


def _write(
    recorder: Recorder, *, folder: str, bandwidth_bytes_per_s: float, latency_s: float, compute_s: float
) -> None:
    """One file for each rank and wrapped model, numbered in the order in which they were wrapped."""
    group = recorder.group
    network = Network(num_ranks=group.size, bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=latency_s)
    plan = recorder.plan(
        recorder.steps,
        network=network,
        compute_s=compute_s,
        passes=recorder.passes,
        forwards=recorder.forwards,
    )
    accounts = {"rank": group.rank, "plan": plan.to_dict(), "trace": recorder.trace().to_dict()}
    write_atomically(Path(folder) / f"rank-{group.rank:06d}.{recorder.number:06d}.json", json.dumps(accounts))


def _phase(
    name: str,
    traffic: Traffic,
    *,
    seconds: float,
    sent: str,
    network: Network,
    compute_s: float = 0.0,
    counts: Mapping[str, int] | None = None,
) -> Phase:
    size = sum(traffic.on(link) for link in traffic.links if link.startswith(sent))
    busy_s = {LINK: size / network.bandwidth_bytes_per_s, COMPUTE: compute_s}
    return Phase(name=name, seconds=seconds, busy_s=busy_s, traffic=traffic, counts=counts or {})
