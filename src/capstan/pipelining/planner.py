"""What an epoch takes: bytes by the formula, and the time that no schedule can beat."""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod

import torch
from torch import nn

from capstan.pipelining.cutting import ChainShapes, cut
from capstan.pipelining.settings import Settings
from capstan.pipelining.traffic import TIED, batch_traffic, micro_batches
from capstan.plans import Alternative, Choice, Phase, Plan, Traffic, bytes_text, rank_link

FIRST, LATER = "first epoch", "later epochs"


@dataclass(frozen=True, kw_only=True)
class Links:
    """What joins neighbouring stages, each way; and the compute of one micro-batch in one stage."""

    bandwidth_bytes_per_s: float
    latency_s: float
    compute_s: float


def step_seconds(
    schedule: str,
    *,
    num_stages: int,
    num_micro_batches: int,
    forward_bytes: float,
    backward_bytes: float,
    links: Links,
) -> float:
    """The ideal time of one batch: S stages, m micro-batches, c bytes of one each way, b bytes/s, a seconds.

        GPipe  (m + S - 1) (max(t_f, c_f / b) + max(t_b, c_b / b)) + 2 (S - 1) a
        1F1B   (m + S - 1) max(t_f + t_b, c_f / b, c_b / b) + 2 (S - 1) (a + (c_f + c_b) / 2 b)

    with backward twice the compute of forward. 1F1B's needs enough micro-batches in flight to cover the
    latency; torch's schedule keeps S - i of them in stage i, so over long links it takes longer. Gradients of
    a tied embedding come after it, and are not in it.
    """
    slots, hops = num_micro_batches + num_stages - 1, 2 * (num_stages - 1)
    forward_s, backward_s = (each / links.bandwidth_bytes_per_s for each in (forward_bytes, backward_bytes))
    if schedule == "gpipe":
        each_s = max(links.compute_s / 3, forward_s) + max(2 * links.compute_s / 3, backward_s)
        return slots * each_s + hops * links.latency_s
    each_s = max(links.compute_s, forward_s, backward_s)
    return slots * each_s + hops * (links.latency_s + (forward_s + backward_s) / 2)


def measured_compute_s(settings: Settings) -> float:
    """Forward and backward of one micro-batch in one stage, the second of two tries: of the decoder its
    share, of a model in a folder the stage with most arithmetic, whose weights are read for it."""
    size = max(1, settings.batch // settings.micro_batches)
    values = torch.zeros(size, settings.sequence, dtype=torch.long)
    if settings.model is None:
        return _second_try_s(settings.decoder(), values) / settings.stages
    slowest = max(settings.cuts, key=lambda cut: cut.flops_per_token)
    if not slowest.is_first:
        values = torch.zeros(*values.shape, slowest.hidden_size)
    return _second_try_s(settings.stage(slowest.index), values)


def _second_try_s(module: nn.Module, values: torch.Tensor) -> float:
    seconds = 0.0
    for _ in range(2):
        start_s = time.perf_counter()
        module(values).logsumexp(-1).sum().backward()
        seconds = time.perf_counter() - start_s
    return seconds


def boundary_rows(settings: Settings) -> list[tuple[int, ...]]:
    """The shape of one sample's activations at each boundary."""
    if settings.model is not None:
        return [(settings.sequence, settings.cuts[0].hidden_size)] * (settings.stages - 1)
    stages = cut(settings.decoder(), settings.stages)
    outputs = ChainShapes(stages).outputs(torch.zeros(1, settings.sequence, dtype=torch.long))
    return [tuple(each.shape[1:]) for each in outputs[:-1]]


def tied_bytes(settings: Settings) -> int:
    """What the first and the last stage of a tied model send each other in a step; 0 for others."""
    if settings.model is None or settings.cuts[0].table is None:
        return 0
    return prod(settings.cuts[0].table_shape) * torch.float32.itemsize


def epoch_traffic(
    settings: Settings, rows: Sequence[tuple[int, ...]], num_samples: int, *, is_first: bool
) -> Traffic:
    """What one epoch sends, by the formula; every sample is visited once an epoch."""
    sizes = [settings.batch] * (num_samples // settings.batch) + [num_samples % settings.batch]
    return Traffic.total(
        batch_traffic(
            settings.compression,
            rows,
            num_new=size if is_first else 0,
            num_known=0 if is_first else size,
            num_micro_batches=settings.micro_batches,
            tied_bytes=tied_bytes(settings),
        )
        for size in sizes
        if size
    )


def plan_training(settings: Settings, num_samples: int, links: Links) -> Plan:
    """What the run will take, and the time of an epoch without compression."""
    rows = boundary_rows(settings)
    # Of a settled epoch; a schedule that is predicted to be slower is named, and used if it was asked for.
    others = [
        Alternative(name=f"schedule {each}", seconds=seconds, reason="predicted for all epochs")
        for each in ("1f1b", "gpipe")
        if each != settings.schedule
        for seconds in [_plan(settings, rows, num_samples, links, schedule=each).seconds]
    ]
    return _plan(settings, rows, num_samples, links, others=others)


def _plan(
    settings: Settings,
    rows: Sequence[tuple[int, ...]],
    num_samples: int,
    links: Links,
    *,
    schedule: str | None = None,
    others: Sequence[Alternative] = (),
) -> Plan:
    first, later = (epoch_traffic(settings, rows, num_samples, is_first=each) for each in (True, False))
    phases = [_phase(FIRST, settings, first, 1, num_samples, links, schedule)]
    if settings.epochs > 1:
        count = settings.epochs - 1
        phases.append(_phase(LATER, settings, count * later, count, num_samples, links, schedule))
    held = num_samples * sum(prod(row) for row in rows[:1]) * 4 if settings.compression.sends_changes else 0
    in_full = replace(settings, forward_bits=None, backward_bits=None)
    full = sum(epoch_traffic(in_full, rows, num_samples, is_first=False).size_bytes.values())
    sent = sum(later.size_bytes.values())
    crossing_s = max((phases[-1].busy_s[link] for link in later.links), default=0.0)
    is_bound_by_links = crossing_s > phases[-1].busy_s["compute"]
    return Plan(
        system="pipelining",
        title=f"{settings.stages} stages, {num_samples} samples, {settings.epochs} epochs",
        machine=platform.node(),
        phases=tuple(phases),
        peak_bytes={"held by one boundary's end": held},
        choices=(
            Choice(name="schedule", value=settings.schedule, reason="as asked"),
            Choice(name="activations", value=_words(settings.forward_bits, not settings.direct)),
            Choice(name="gradients", value=_words(settings.backward_bits, False)),
            Choice(
                name="bytes an epoch",
                value=bytes_text(sent),
                reason=f"{full / sent:.1f} times fewer than in full precision, after the first epoch",
            ),
        ),
        decision=asdict(settings),
        bound="the links' bandwidth" if is_bound_by_links else "the stages' compute",
        alternatives=tuple(others),
    )


def _phase(
    name: str,
    settings: Settings,
    traffic: Traffic,
    epochs: int,
    num_samples: int,
    links: Links,
    schedule: str | None,
) -> Phase:
    steps = epochs * -(-num_samples // settings.batch)
    parts = micro_batches(min(settings.batch, num_samples), settings.micro_batches)
    seconds = step_seconds(
        schedule or settings.schedule,
        num_stages=settings.stages,
        num_micro_batches=parts,
        forward_bytes=traffic.size_bytes[rank_link(0, 1), "activations"] / (steps * parts),
        backward_bytes=traffic.size_bytes[rank_link(1, 0), "gradients"] / (steps * parts),
        links=links,
    )
    if tied := traffic.size_bytes.get((rank_link(0, settings.stages - 1), TIED)):
        seconds += tied / steps / links.bandwidth_bytes_per_s + links.latency_s
    busy_s = {link: traffic.on(link) / links.bandwidth_bytes_per_s for link in traffic.links}
    return Phase(
        name=name,
        seconds=steps * seconds,
        busy_s=busy_s | {"compute": steps * parts * links.compute_s},
        traffic=traffic,
        counts={"samples": epochs * num_samples},
    )


def _words(num_bits: int | None, are_changes: bool) -> str:
    if num_bits is None:
        return "full precision"
    return f"{num_bits} bits" + (", of changes" if are_changes else ", direct")
