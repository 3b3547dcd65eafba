"""One training step of a layout in virtual time: schedule, compute, messages both ways, gradient exchange."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from capstan.allocation.layout import Layout
from capstan.allocation.messages import Interfaces, Messages
from capstan.allocation.virtual_time import Interval, Work, simulate
from capstan.errors import UsageError, unknown_name
from capstan.hardware import Cluster

SCHEDULES = ("gpipe", "1f1b")


@dataclass(frozen=True, kw_only=True)
class StepTask:
    """What one replica computes and sends in a step.

    `forward_s` and `backward_s` are seconds of one micro-batch, for each device of the cluster by number: a
    slower device or one with more layers takes longer. `activation_bytes` cross each boundary forward for one
    micro-batch and `backward_bytes` come back, as many unless given; `gradient_bytes` are those of a stage,
    one number for all or one for each, exchanged by its replicas when all micro-batches are done.
    """

    micro_batches: int
    forward_s: Sequence[float]
    backward_s: Sequence[float]
    activation_bytes: float
    backward_bytes: float | None = None
    gradient_bytes: float | Sequence[float] = 0.0
    schedule: str = "1f1b"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        if self.micro_batches < 1:
            raise UsageError(f"A step has at least 1 micro-batch, not {self.micro_batches}.")
        gradients = (
            self.gradient_bytes if isinstance(self.gradient_bytes, Sequence) else [self.gradient_bytes]
        )
        if not all(0 <= size < math.inf for size in (*self.message_bytes.values(), *gradients)):
            raise UsageError("A message has 0 bytes or more, and not infinitely many.")

    @property
    def message_bytes(self) -> dict[str, float]:
        """What crosses a boundary, by direction."""
        back = self.activation_bytes if self.backward_bytes is None else self.backward_bytes
        return {"forward": self.activation_bytes, "backward": back}


class StepSimulation(NamedTuple):
    """How long the step takes, when everything ran, and the micro-batches that each stage holds at most."""

    seconds: float
    intervals: tuple[Interval, ...]
    in_flight: tuple[int, ...]


def simulate_step(
    cluster: Cluster, layout: Layout, task: StepTask, *, interfaces: Interfaces | None = None
) -> StepSimulation:
    """A step of the layout used as listed: member r of a stage sends to member r of the next.

    A device computes one micro-batch at a time in the order of its schedule. Each direction of each link is a
    resource: full duplex, messages one after the other, and the latency passes while the next is sent. To
    exchange gradients every device sends its peers their shares one after the other, and when it has all of
    its own, the sum to each: a reduce-scatter and an all-gather. `interfaces` bound what a device sends and
    receives besides, see `Messages`.

    On a uniform chain GPipe takes S t_f + (S-1)(c + a) + (M-1) max(t_f, c) forward, and the same with t_b
    backward; c are the seconds of a message and a the latency. Everything has its turn in an order that does
    not depend on times, so a slower link or device and a larger message never make the step shorter.

    Source: the schedules are GPipe's and PipeDream's (1F1B with a flush).
    """
    count = len(cluster.names)
    for name in ("forward_s", "backward_s"):
        if len(getattr(task, name)) != count:
            raise UsageError(f"{name} has {len(getattr(task, name))} entries for {count} devices.")
    if layout.num_stages * layout.num_replicas != count:
        raise UsageError(f"The layout does not hold the {count} devices of the cluster.")
    gradients = task.gradient_bytes
    if not isinstance(gradients, Sequence):
        gradients = [gradients] * layout.num_stages
    if len(gradients) != layout.num_stages:
        raise UsageError(f"gradient_bytes has {len(gradients)} entries for {layout.num_stages} stages.")
    messages = Messages(cluster, interfaces)
    works: list[Work] = []
    for replica in range(layout.num_replicas):
        works += _pipeline(messages, [group[replica] for group in layout.groups], task)
    for group, size in zip(layout.groups, gradients, strict=True):
        if size and len(group) > 1:
            works += _exchange(messages, group, size, task.micro_batches)
    intervals = simulate(works)
    # A message counts until it has arrived.
    delays = {work.name: work.delay_s for work in works}
    ends = max(each.end_s + delays[each.name] for each in intervals)
    stages = range(layout.num_stages)
    return StepSimulation(
        ends, intervals, tuple(most_held(stage, layout.num_stages, task) for stage in stages)
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


def most_held(stage: int, stages: int, task: StepTask) -> int:
    """How many micro-batches a stage holds at once: forward done and backward not yet."""
    held = most = 0
    for direction, _ in stage_order(stage, stages, task):
        held += 1 if direction == "forward" else -1
        most = max(most, held)
    return most


def _pipeline(messages: Messages, devices: Sequence[int], task: StepTask) -> Iterator[Work]:
    """The works of one replica."""
    names, last, size = messages.names, len(devices) - 1, task.message_bytes
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
                yield messages.send(
                    device, devices[target], size[direction], (work,),
                    name=f"{direction} {number} to {names[devices[target]]}",
                )  # fmt: skip
        # What comes in has its turn as the stage before works: its forward messages in that order, and
        # between them the gradients without which it would not have sent more.
        for direction, number in stage_order(max(stage - 1, 0), len(devices), task):
            source = stage - 1 if direction == "forward" else stage + 1
            if 0 <= source <= last:
                yield from messages.receive(
                    devices[source], device, size[direction], f"{direction} {number} to {names[device]}"
                )


def _exchange(messages: Messages, group: Sequence[int], size: float, micro_batches: int) -> Iterator[Work]:
    """Reduce-scatter and all-gather of one stage, every device in a rotation of its own."""
    names, many = messages.names, len(group)
    for place, device in enumerate(group):
        targets = [group[(place + step) % many] for step in range(1, many)]
        sources = [group[(place - step) % many] for step in range(1, many)]
        shares = tuple(f"share to {names[device]} from {names[peer]}" for peer in sources)
        done = f"backward {micro_batches - 1} on {names[device]}"
        for turn, (kind, after) in enumerate((("share", (done,)), ("sum", (done, *shares)))):
            for number, peer in enumerate(targets):
                # All shares before all sums: what goes first must not depend on what was faster.
                yield messages.send(
                    device, peer, size / many, after, name=f"{kind} to {names[peer]} from {names[device]}",
                    resource=f"{names[device]} gradients", order=turn * many + number,
                )  # fmt: skip
            for peer in sources:
                yield from messages.receive(
                    peer, device, size / many, f"{kind} to {names[device]} from {names[peer]}"
                )
