"""Planning under the simulated step, and planning again when devices change."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.allocation import (
    Layout,
    StepAllocation,
    StepTask,
    TrainingTask,
    contiguous,
    plan_step,
    regions_on_a_globe,
    replan,
    simulate_step,
)
from capstan.allocation.step_bound import StepBounds
from capstan.allocation.training_step import (
    Bits,
    DeviceFacts,
    StepShape,
    layer_bytes,
    layers_by_speed,
    step_task,
    wire_bytes,
)
from capstan.codecs import GroupQuantised
from capstan.errors import DoesNotFit, UsageError
from capstan.hardware import Cluster, Device
from capstan.plans import Plan, explain

SMALL = TrainingTask(parameters=1e8, num_layers=8, batch_tokens=2**16, sequence_tokens=1024)


def globe(regions: int = 4, each: int = 2, seed: int = 0) -> Cluster:
    return regions_on_a_globe(regions, devices_per_region=each, seed=seed)


def with_devices(cluster: Cluster, facts: dict[str, tuple[float, int]]) -> Cluster:
    """Flops/s and memory of some devices."""
    devices = {
        name: Device(
            name=name, kind="cuda", memory_bytes=memory_bytes, matmul_flops_per_s={"float16": flops},
            memory_bandwidth_bytes_per_s=1e12,
        )
        for name, (flops, memory_bytes) in facts.items()
    }  # fmt: skip
    return Cluster(
        names=cluster.names, latency_s=cluster.latency_s,
        bandwidth_bytes_per_s=cluster.bandwidth_bytes_per_s, devices=devices,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned() -> StepAllocation:
    return plan_step(globe(), task=SMALL)


def test_a_plan_says_how_the_step_runs_and_what_else_would_take(planned: StepAllocation) -> None:
    plan = planned.plan
    assert plan.seconds == pytest.approx(planned.seconds, rel=1e-12)
    assert planned.seconds == planned.simulation.seconds
    assert sorted(plan.decision["ranks"]) == sorted(globe().names)
    assert sum(plan.decision["layers"]) == 8
    assert planned.seconds <= min(each.seconds for each in plan.alternatives) * (1 + 1e-12)
    assert {"contiguous", "strided", "random ranks"} <= {each.name for each in plan.alternatives}
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "contiguous" in explain(plan)


@given(seed=st.integers(0, 100), stages=st.sampled_from([None, 2, 4]))
@settings(max_examples=6, deadline=None)
def test_the_plain_layout_is_never_faster_with_any_stages_or_micro_batches(
    seed: int, stages: int | None
) -> None:
    cluster = globe(seed=seed)
    found = plan_step(cluster, stages=stages, task=SMALL, seed=seed)
    for depth in [stages] if stages else [1, 2, 4, 8]:
        layout = contiguous(8, stages=depth)
        for schedule in ("gpipe", "1f1b"):
            for many in (1, 2, 4, 8):
                task = step_task(
                    SMALL, found.goal.facts, layout, [8 // depth] * depth, StepShape(schedule, many, Bits())
                )
                assert found.seconds <= simulate_step(cluster, layout, task).seconds * (1 + 1e-9)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_no_simulated_step_is_shorter_than_its_bound(data: st.DataObject) -> None:
    stages, replicas = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    count = stages * replicas
    times = st.floats(0, 4)
    cluster = Cluster(
        names=tuple(f"d{number}" for number in range(count)),
        latency_s=[[data.draw(times) for _ in range(count)] for _ in range(count)],  # type: ignore[arg-type]
        bandwidth_bytes_per_s=[  # type: ignore[arg-type]
            [data.draw(st.floats(0.1, 4)) for _ in range(count)] for _ in range(count)
        ],
    )
    task = StepTask(
        micro_batches=data.draw(st.integers(1, 5)),
        forward_s=[data.draw(times) for _ in range(count)],
        backward_s=[data.draw(times) for _ in range(count)],
        activation_bytes=data.draw(times),
        backward_bytes=data.draw(times),
        gradient_bytes=[data.draw(times) for _ in range(stages)],
        schedule=data.draw(st.sampled_from(["gpipe", "1f1b"])),
    )
    layout = Layout.from_array(np.array(data.draw(st.permutations(range(count)))).reshape(stages, replicas))
    bound_s = StepBounds(cluster).seconds(layout, task)
    assert bound_s <= simulate_step(cluster, layout, task).seconds * (1 + 1e-12)


@pytest.mark.parametrize("num_bits", [*range(1, 9)])
def test_bytes_on_a_wire_are_those_of_the_codec(num_bits: int) -> None:
    assert wire_bytes(640, num_bits) == GroupQuantised(num_bits=num_bits).encoded_bytes(
        (10, 64), torch.float32
    )


def test_bits_are_given_up_only_where_that_is_faster() -> None:
    cluster = globe()
    asked = {
        "activation_bits": (4, 16), "gradient_bits": (8, 16), "data_parallel_bits": (8, 32),
    }  # fmt: skip
    alone = plan_step(cluster, stages=8, task=SMALL, **asked)  # type: ignore[arg-type]
    # With one replica nothing is exchanged within stages, so all 32 bits stay.
    assert alone.step.shape.bits == Bits(activations=4, activation_gradients=8, gradients=32)
    one_stage = plan_step(cluster, stages=1, task=SMALL, **asked)  # type: ignore[arg-type]
    assert one_stage.step.shape.bits == Bits(activations=16, activation_gradients=16, gradients=8)
    assert one_stage.seconds < plan_step(cluster, stages=1, task=SMALL).seconds


def test_a_stage_of_fast_devices_takes_more_layers() -> None:
    cluster = globe(1, 4)
    fast = with_devices(
        cluster, {name: (3e13 if name[-1] in "01" else 1e13, 10**12) for name in cluster.names}
    )
    assert plan_step(fast, layout=contiguous(4, stages=2), task=SMALL).step.layers == (6, 2)
    # One slow device makes its whole stage slow.
    mixed = Layout(groups=((0, 2), (1, 3)))
    assert plan_step(fast, layout=mixed, task=SMALL).step.layers == (4, 4)


def test_what_a_stage_holds_is_weights_and_the_micro_batches_in_flight() -> None:
    # 8 layers of 12.5e6 parameters in 2 stages; 2**16 / 4 / 4 tokens of 2048 values in a micro-batch.
    inputs = 2**12 * 2048 * 2
    for schedule, held in (("gpipe", (4, 4)), ("1f1b", (2, 1))):
        shape = StepShape(schedule, 4, Bits())
        for stage in range(2):
            found = layer_bytes(SMALL, shape, stage=stage, stages=2, replicas=4)
            assert found == 16 * 12.5e6 + held[stage] * inputs


def test_memory_decides_where_layers_lie_and_what_fits_nowhere_is_an_error() -> None:
    cluster = globe(2, 1)
    roomy = 10**12
    of_layer = layer_bytes(SMALL, StepShape("1f1b", 64, Bits()), stage=0, stages=2, replicas=1)
    for small_layers in (1, 3):
        memory = math.ceil(of_layer * small_layers)
        pressed = with_devices(cluster, {cluster.names[0]: (1e13, roomy), cluster.names[1]: (1e13, memory)})
        found = plan_step(pressed, stages=2, task=SMALL, schedule="1f1b", micro_batches=64)
        last = next(stage for stage, group in enumerate(found.layout.groups) if group == (1,))
        assert 1 <= found.step.layers[last] <= small_layers + 1
        assert found.plan.peak_bytes[cluster.names[1]] <= memory
    nowhere = with_devices(cluster, dict.fromkeys(cluster.names, (1e13, 10**8)))
    with pytest.raises(DoesNotFit, match="fits nowhere: not with 1 or 2 stages on 2 devices.*a layer takes"):
        plan_step(nowhere, task=SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "2f2b"}, "no schedule '2f2b'"),
        ({"stages": 3}, "do not divide evenly"),
        ({"stages": 16}, "fewer devices than stages"),
        ({"micro_batches": 0}, "at least 1 micro-batch"),
        ({"micro_batches": 10_000}, "do not make 10000 micro-batches"),
        ({"activation_bits": (9,)}, "no 9 bits for activations"),
        ({"gradient_bits": (0,)}, "no 0 bits for activation_gradients"),
        ({"data_parallel_bits": (64,)}, "no 64 bits for gradients"),
        ({"unknown_flops_per_s": float("nan")}, "computes nan flops/s"),
        ({"search": "genetic"}, "no search 'genetic'"),
        ({"layout": contiguous(4, stages=2)}, "holds 4 devices, but the cluster has 8"),
    ],
)
def test_what_makes_no_step_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_step(globe(), **{"task": SMALL} | arguments)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="4 layers cannot make 8 stages"):
        plan_step(globe(), stages=8, task=replace(SMALL, num_layers=4))


def even_step() -> tuple[Cluster, StepAllocation]:
    cluster = globe(4, 3)
    return cluster, plan_step(cluster, layout=contiguous(12, stages=4), task=SMALL, micro_batches=4)


def test_who_leaves_takes_a_replica_along_and_stages_fill_their_own_holes() -> None:
    cluster, current = even_step()
    names = [[cluster.names[each] for each in group] for group in current.layout.groups]
    one = replan(cluster, current, without=[names[1][0]])
    assert one.before_s == current.seconds
    assert (one.allocation.layout.num_replicas, one.num_moves) == (2, 0)
    # Two devices of two stages and two replicas: one replica is left if nobody moves, two if holes fill.
    two = replan(cluster, current, without=[names[0][0], names[2][1]])
    assert two.allocation.layout.num_replicas == 2
    assert two.moved_bytes == {}
    assert two.unchanged_s is not None
    assert two.allocation.seconds < two.unchanged_s


def test_a_stage_that_is_gone_is_taken_over_and_its_weights_are_counted() -> None:
    cluster, current = even_step()
    names = [[cluster.names[each] for each in group] for group in current.layout.groups]
    found = replan(cluster, current, without=names[2])
    assert found.unchanged_s is None
    layout = found.allocation.layout
    assert (layout.num_stages, layout.num_replicas) == (4, 2)
    assert not set(names[2]) & set(found.cluster.names)
    # Two spare devices of other stages now hold two layers of 12.5e6 parameters each.
    assert sorted(found.moved_bytes.values()) == [2 * 50_000_000] * 2


def test_too_few_for_the_stages_are_planned_afresh() -> None:
    cluster, current = even_step()
    found = replan(cluster, current, without=cluster.names[:9])
    assert found.unchanged_s is None
    assert found.cluster.names == cluster.names[9:]
    assert sum(found.allocation.step.layers) == 8
    # They held the last two of eight layers, of 50 MB each, and now hold all between them at least once.
    assert sum(found.moved_bytes.values()) >= 6 * 50_000_000


def test_a_slow_device_is_left_out_or_given_less_when_that_is_faster() -> None:
    cluster, current = even_step()
    slow = cluster.names[4]
    found = replan(cluster, current, slow={slow: 5000.0})
    assert found.unchanged_s is not None
    assert found.unchanged_s > 2 * found.before_s
    assert found.allocation.seconds < found.unchanged_s / 2
    assert found.num_moves == 0
    assert slow not in found.cluster.names
    same = replan(cluster, current, slow={slow: 1.0})
    assert (same.allocation.seconds, same.num_moves) == (current.seconds, 0)


@given(seed=st.integers(0, 50), data=st.data())
@settings(max_examples=10, deadline=None)
def test_a_new_plan_is_never_much_slower_than_staying(seed: int, data: st.DataObject) -> None:
    cluster, current = even_step()
    gone = data.draw(st.sets(st.sampled_from(cluster.names), max_size=3))
    slow = data.draw(
        st.dictionaries(
            st.sampled_from([each for each in cluster.names if each not in gone]), st.floats(1, 9)
        )
    )
    found = replan(cluster, current, slow=slow, without=gone)
    assert not gone & set(found.cluster.names)
    if found.unchanged_s is not None:
        assert found.allocation.seconds <= found.unchanged_s * 1.05
    assert set(found.moved_bytes) <= set(found.cluster.names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without": ["moon"]}, "no device 'moon'"),
        ({"slow": {"moon": 2.0}}, "no device 'moon'"),
        ({"slow": {"region0-0": 0.5}}, "by a factor of 0.5; give 1"),
        ({"slow": {"region0-0": math.nan}}, "by a factor of nan"),
        ({"slow": {"region0-0": 2.0}, "without": ["region0-0"]}, "slower and gone"),
        ({"without": globe(4, 3).names}, "No device is left"),
    ],
)
def test_changes_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    cluster, current = even_step()
    with pytest.raises(UsageError, match=message):
        replan(cluster, current, **arguments)


def test_a_step_of_another_cluster_is_not_planned_anew() -> None:
    _, current = even_step()
    with pytest.raises(UsageError, match="holds 12 devices, but the cluster has 8"):
        replan(globe(), current)


def test_what_is_left_may_not_fit() -> None:
    cluster = globe(2, 2)
    tight = with_devices(cluster, dict.fromkeys(cluster.names, (1e13, 1_500_000_000)))
    current = plan_step(tight, stages=2, task=SMALL, schedule="1f1b", micro_batches=16)
    assert replan(tight, current, without=[cluster.names[0]]).allocation.layout.num_replicas == 1
    barely = with_devices(cluster, dict.fromkeys(cluster.names, (1e13, 1_400_000_000)))
    current = plan_step(barely, stages=2, task=SMALL, schedule="gpipe", micro_batches=16)
    with pytest.raises(DoesNotFit, match="fits nowhere: not with 1 or 3 stages on 3 devices"):
        replan(barely, current, without=[cluster.names[0]])


def test_layers_cannot_be_more_stages() -> None:
    facts = DeviceFacts.of(globe(), unknown_flops_per_s=1e13)
    with pytest.raises(UsageError, match="8 layers cannot make"):
        layers_by_speed(
            replace(SMALL, num_layers=8), DeviceFacts.of(globe(9, 1)), contiguous(9, stages=9),
            StepShape("gpipe", 1, Bits()),
        )  # fmt: skip
    assert facts.flops_per_s == (1e13,) * 8
