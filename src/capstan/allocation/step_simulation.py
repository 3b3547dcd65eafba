"""One training step of a layout in virtual time: schedule, compute, messages both ways, gradient exchange."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from capstan.allocation.layout import Layout
from capstan.allocation.virtual_time import Interval, Work, simulate
from capstan.errors import UsageError, unknown_name
from capstan.hardware import Cluster
from capstan.plans import link_name

SCHEDULES = ("gpipe", "1f1b")


@dataclass(frozen=True, kw_only=True)
class StepTask:
    """What one replica computes and sends in a step.

    `forward_s` and `backward_s` are seconds of one micro-batch, for each device of the cluster by number.
    `activation_bytes` cross each boundary forward for one micro-batch, as many gradients come back;
    `gradient_bytes` are those of one stage, exchanged by its replicas when all micro-batches are done.
    """

    micro_batches: int
    forward_s: Sequence[float]
    backward_s: Sequence[float]
    activation_bytes: float
    gradient_bytes: float = 0.0
    schedule: str = "1f1b"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        if self.micro_batches < 1:
            raise UsageError(f"A step has at least 1 micro-batch, not {self.micro_batches}.")
        if not min(self.activation_bytes, self.gradient_bytes) >= 0:
            raise UsageError("A message has 0 bytes or more.")


class StepSimulation(NamedTuple):
    """How long the step takes, when everything ran, and the micro-batches that each stage holds at most."""

    seconds: float
    intervals: tuple[Interval, ...]
    in_flight: tuple[int, ...]


def simulate_step(cluster: Cluster, layout: Layout, task: StepTask) -> StepSimulation:
    """A step of the layout used as listed: member r of a stage sends to member r of the next.

    A device computes one micro-batch at a time in the order of its schedule. Each direction of each link is a
    resource: full duplex, messages one after the other, and the latency passes while the next is sent. To
    exchange gradients every device sends its peers their shares one after the other through one interface,
    and when it has all of its own, the sum to each: a reduce-scatter and an all-gather.

    On a uniform chain GPipe takes S t_f + (S-1)(c + a) + (M-1) max(t_f, c) forward, and the same with t_b
    backward; c are the seconds of a message and a the latency.

    Source: the schedules are GPipe's and PipeDream's (1F1B with a flush).
    """
    count = len(cluster.names)
    for name in ("forward_s", "backward_s"):
        if len(getattr(task, name)) != count:
            raise UsageError(f"{name} has {len(getattr(task, name))} entries for {count} devices.")
    if layout.num_stages * layout.num_replicas != count:
        raise UsageError(f"The layout does not hold the {count} devices of the cluster.")
    works = [
        work
        for replica in range(layout.num_replicas)
        for work in _pipeline(cluster, [group[replica] for group in layout.groups], task)
    ]
    if task.gradient_bytes and layout.num_replicas > 1:
        works += [work for group in layout.groups for work in _exchange(cluster, group, task)]
    intervals = simulate(works)
    # A message counts until it has arrived.
    delays = {work.name: work.delay_s for work in works}
    ends = max(each.end_s + delays[each.name] for each in intervals)
    stages = range(layout.num_stages)
    return StepSimulation(
        ends, intervals, tuple(_most_held(stage, layout.num_stages, task) for stage in stages)
    )


def stage_order(stage: int, stages: int, task: StepTask) -> list[tuple[str, int]]:
    """What a stage computes, in order: forward or backward, and of which micro-batch.

    GPipe: all forward, then all backward. 1F1B: stages - stage forward, then backward and forward in turn.
    """
    many = task.micro_batches
    ahead = many if task.schedule == "gpipe" else min(many, stages - stage)
    order = [("forward", number) for number in range(ahead)]
    for number in range(many):
        order.append(("backward", number))
        if ahead + number < many:
            order.append(("forward", ahead + number))
    return order


def _most_held(stage: int, stages: int, task: StepTask) -> int:
    held = most = 0
    for direction, _ in stage_order(stage, stages, task):
        held += 1 if direction == "forward" else -1
        most = max(most, held)
    return most


def _pipeline(cluster: Cluster, devices: Sequence[int], task: StepTask) -> Iterator[Work]:
    """The works of one replica."""
    names, last = cluster.names, len(devices) - 1
    for stage, device in enumerate(devices):
        previous: tuple[str, ...] = ()
        for direction, number in stage_order(stage, len(devices), task):
            forward = direction == "forward"
            source = stage - 1 if forward else stage + 1
            needs = () if not 0 <= source <= last else (f"{direction} {number} to {names[device]}",)
            work = f"{direction} {number} on {names[device]}"
            seconds = (task.forward_s if forward else task.backward_s)[device]
            yield Work(name=work, resource=names[device], seconds=seconds, after=(*previous, *needs))
            previous = (work,)
            target = stage + 1 if forward else stage - 1
            if 0 <= target <= last:
                yield _message(
                    cluster, device, devices[target], task.activation_bytes, (work,),
                    name=f"{direction} {number} to {names[devices[target]]}",
                )  # fmt: skip


def _exchange(cluster: Cluster, group: Sequence[int], task: StepTask) -> Iterator[Work]:
    """Reduce-scatter and all-gather of one stage, every device in a rotation of its own."""
    names, many = cluster.names, task.micro_batches
    size = task.gradient_bytes / len(group)

    def rotation(place: int) -> list[int]:
        return [group[(place + step) % len(group)] for step in range(1, len(group))]

    for place, device in enumerate(group):
        peers = rotation(place)
        shares = tuple(f"share from {names[peer]} to {names[device]}" for peer in peers)
        done = f"backward {many - 1} on {names[device]}"
        for kind, after in (("share", (done,)), ("sum", (done, *shares))):
            for number, peer in enumerate(peers):
                yield _message(
                    cluster, device, peer, size, after, name=f"{kind} from {names[device]} to {names[peer]}",
                    interface=f"{names[device]} gradients", order=number,
                )  # fmt: skip


def _message(
    cluster: Cluster,
    source: int,
    target: int,
    size: float,
    after: tuple[str, ...],
    *,
    name: str,
    interface: str | None = None,
    order: int = 0,
) -> Work:
    return Work(
        name=name,
        resource=interface or link_name(cluster.names[source], cluster.names[target]),
        seconds=size / cluster.bandwidth_bytes_per_s[source][target],
        delay_s=cluster.latency_s[source][target],
        after=after,
        order=order,
    )
