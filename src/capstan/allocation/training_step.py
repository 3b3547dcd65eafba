"""From a training task to the seconds, bytes and memory of each stage: what the simulated step is made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from capstan.allocation.layout import Layout
from capstan.allocation.step_simulation import StepTask, most_held
from capstan.allocation.task import STATE_BYTES_PER_PARAMETER, TrainingTask
from capstan.errors import DoesNotFit, UsageError
from capstan.hardware import Cluster
from capstan.plans import bytes_text

# A V100, the paper's device, at two fifths of its 125 TFLOP/s.
UNKNOWN_FLOPS_PER_S = 5e13
# Two numbers of 2 bytes for each group of 64 codes, as `capstan.codecs.GroupQuantised` stores them.
_GROUP, _GROUP_BYTES = 64, 4
_GROUP_WIDTHS, _FLOAT_WIDTHS = range(1, 9), (16, 32)
_HELD_BYTES_PER_VALUE = 2


@dataclass(frozen=True, kw_only=True)
class Bits:
    """How many bits a number has on its way: 1 to 8 are codes in groups of 64, 16 and 32 floats.

    `activations` go forward over a boundary, `activation_gradients` back, `gradients` between replicas.
    """

    activations: int = 16
    activation_gradients: int = 16
    gradients: int = 32

    def __post_init__(self) -> None:
        for name, num_bits in vars(self).items():
            if num_bits not in (*_GROUP_WIDTHS, *_FLOAT_WIDTHS):
                raise UsageError(f"There are no {num_bits} bits for {name}; give 1 to 8, 16 or 32.")


def wire_bytes(num_values: float, num_bits: int) -> float:
    """What so many numbers take on a link; codes with the two numbers of each group."""
    codes = num_values * num_bits / 8
    return codes + num_values / _GROUP * _GROUP_BYTES if num_bits in _GROUP_WIDTHS else codes


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """Of each device by number: how fast it computes, and what fits into it (infinity where not known)."""

    flops_per_s: tuple[float, ...]
    memory_bytes: tuple[float, ...]

    @classmethod
    def of(cls, cluster: Cluster, *, unknown_flops_per_s: float = UNKNOWN_FLOPS_PER_S) -> "DeviceFacts":
        """What the cluster tells; of several rates the best, since training runs in the fastest dtype."""
        if not 0 < unknown_flops_per_s < math.inf:
            raise UsageError(f"A device computes {unknown_flops_per_s} flops/s; give a number above 0.")
        known = [cluster.devices.get(name) for name in cluster.names]
        return cls(
            flops_per_s=tuple(
                max(device.matmul_flops_per_s.values(), default=unknown_flops_per_s)
                if device
                else unknown_flops_per_s
                for device in known
            ),
            memory_bytes=tuple(device.memory_bytes if device else math.inf for device in known),
        )

    def slowed(self, factors: dict[int, float]) -> "DeviceFacts":
        """The same devices, some of them slower by a factor."""
        rates = tuple(rate / factors.get(device, 1.0) for device, rate in enumerate(self.flops_per_s))
        return DeviceFacts(flops_per_s=rates, memory_bytes=self.memory_bytes)


class StepShape(NamedTuple):
    """How a step is run: everything but who computes what."""

    schedule: str
    micro_batches: int
    bits: Bits


def step_task(
    task: TrainingTask, facts: DeviceFacts, layout: Layout, layers: Sequence[int], shape: StepShape
) -> StepTask:
    """What `simulate_step` runs, for a layout whose stages have so many layers each.

    forward_s = 2 parameters tokens / flops_per_s, of the stage's layers and one micro-batch's tokens
    backward_s = twice that
    activation_bytes = wire_bytes(tokens hidden_size), and as many gradients back, each in its bits
    gradient_bytes = wire_bytes(parameters of the stage)
    """
    tokens = task.batch_tokens / layout.num_replicas / shape.micro_batches
    of_layer = task.parameters / task.num_layers
    forward_s = [0.0] * len(facts.flops_per_s)
    for group, count in zip(layout.groups, layers, strict=True):
        for device in group:
            forward_s[device] = 2 * of_layer * count * tokens / facts.flops_per_s[device]
    values = tokens * task.hidden_size
    return StepTask(
        micro_batches=shape.micro_batches,
        forward_s=forward_s,
        backward_s=[2 * seconds for seconds in forward_s],
        activation_bytes=wire_bytes(values, shape.bits.activations),
        backward_bytes=wire_bytes(values, shape.bits.activation_gradients),
        gradient_bytes=[wire_bytes(of_layer * count, shape.bits.gradients) for count in layers],
        schedule=shape.schedule,
    )


def layer_bytes(task: TrainingTask, shape: StepShape, *, stage: int, stages: int, replicas: int) -> float:
    """Memory of one layer in a stage: weight, gradient and Adam's moments in 4 bytes each, and the layer's
    input in 2 bytes for each token of the micro-batches that the stage holds; the rest is computed again."""
    one = StepTask(
        micro_batches=shape.micro_batches, forward_s=(), backward_s=(), activation_bytes=0.0,
        schedule=shape.schedule,
    )  # fmt: skip
    tokens = task.batch_tokens / replicas / shape.micro_batches
    held = most_held(stage, stages, one) * tokens * task.hidden_size * _HELD_BYTES_PER_VALUE
    return STATE_BYTES_PER_PARAMETER * task.parameters / task.num_layers + held


def layers_by_speed(
    task: TrainingTask, facts: DeviceFacts, layout: Layout, shape: StepShape, *, even: bool = False
) -> tuple[int, ...]:
    """How many layers each stage takes, so that the slowest stage is as fast as can be and all fit.

    A stage is as fast as its slowest device and holds what its smallest holds. Layers are given one by one
    to the stage that will have finished first with it, which minimises the maximum; `even` ignores speed.

    Raises:
        UsageError: there are more stages than layers.
        DoesNotFit: the layers do not fit into the stages.
    """
    stages, total = layout.num_stages, task.num_layers
    if stages > total:
        raise UsageError(f"{total} layers cannot make {stages} stages; ask for {total} stages at most.")
    speed = [1.0 if even else min(facts.flops_per_s[device] for device in group) for group in layout.groups]
    room = _room(task, facts, layout, shape)
    if min(room) < 1 or sum(room) < total:
        raise _does_not_fit(task, facts, layout, shape, min(range(stages), key=lambda each: room[each]))
    layers = [1] * stages
    for _ in range(total - stages):
        open_stages = [stage for stage in range(stages) if layers[stage] < room[stage]]
        layers[min(open_stages, key=lambda stage: (layers[stage] + 1) / speed[stage])] += 1
    return tuple(layers)


def require_room(
    task: TrainingTask, facts: DeviceFacts, layout: Layout, layers: Sequence[int], shape: StepShape
) -> None:
    """The layers fit into the devices that are to hold them.

    Raises:
        DoesNotFit: they do not.
    """
    for stage, room in enumerate(_room(task, facts, layout, shape)):
        if layers[stage] > room:
            raise _does_not_fit(task, facts, layout, shape, stage)


def _room(task: TrainingTask, facts: DeviceFacts, layout: Layout, shape: StepShape) -> list[int]:
    """How many layers fit into the smallest device of each stage."""
    return [
        math.floor(
            min(
                min(facts.memory_bytes[device] for device in group)
                / layer_bytes(
                    task, shape, stage=stage, stages=layout.num_stages, replicas=layout.num_replicas
                ),
                task.num_layers,
            )
        )
        for stage, group in enumerate(layout.groups)
    ]


def _does_not_fit(
    task: TrainingTask, facts: DeviceFacts, layout: Layout, shape: StepShape, stage: int
) -> DoesNotFit:
    stages, replicas = layout.num_stages, layout.num_replicas
    smallest = min(facts.memory_bytes[device] for device in layout.groups[stage])
    size = layer_bytes(task, shape, stage=stage, stages=stages, replicas=replicas)
    return DoesNotFit(
        f"{task.num_layers} layers do not fit into {stages} stages of {replicas} devices: a layer takes "
        f"{bytes_text(size)} in stage {stage}, whose smallest device has {bytes_text(smallest)}, and all "
        f"stages have room for {sum(_room(task, facts, layout, shape))}."
    )
