"""A plan's decisions in words."""

from capstan.generation.model import Model
from capstan.generation.planning.batching import BlockShape
from capstan.generation.planning.placement import Placement, realised
from capstan.plans import Choice, bytes_text


def choices_of(
    model: Model, placement: Placement, shape: BlockShape, *, keeps_cache: bool
) -> tuple[Choice, ...]:
    """What was decided, and why, for `explain`."""
    tensors = list(model.manifest.placeable.values())
    where = [placement.weights[each.name] for each in tensors]
    sizes = [each.stored_bytes for each in tensors]
    first = shape.batches[0]
    choices = [
        *_layers_choice(model, shape),
        Choice(
            name="block",
            value=f"{len(shape.batches)} x {first.slots} sequences of up to {first.capacity} tokens",
            reason="weights cross once for the whole block",
        ),
        *_prefix_choice(shape),
        Choice(name="weights", value=realised(where, sizes), reason=bytes_text(sum(sizes))),
    ]
    if keeps_cache:
        rows = [layout.row_bytes for layout in model.formats]
        room = sum(batch.slots * batch.capacity for batch in shape.batches)
        choices.append(
            Choice(
                name="KV cache",
                value=f"{realised(placement.cache, rows)} ({model.formats[0].codec.name})",
                reason=bytes_text(room * sum(rows)),
            )
        )
        choices.append(_attention_choice(placement, len(shape.batches)))
    choices.append(Choice(name="activations", value=placement.activations))
    return tuple(choices)


def _attention_choice(placement: Placement, num_batches: int) -> Choice:
    reason = "where a cache that is not on the device is attended; the link and the host share the work"
    if all(tier == "device" for tier in placement.cache):
        return Choice(name="attention", value="device", reason="where the cache is")
    on_host = len(placement.host_batches(num_batches))
    if on_host in (0, num_batches):
        return Choice(name="attention", value="host" if on_host else "device", reason=reason)
    value = f"host {on_host} of {num_batches} batches, device {num_batches - on_host}"
    return Choice(name="attention", value=value, reason=reason)


def _prefix_choice(shape: BlockShape) -> list[Choice]:
    reason = "all prompts begin with the same tokens: computed and stored once"
    return [Choice(name="prefix", value=f"{shape.prefix} tokens", reason=reason)] if shape.prefix else []


def _layers_choice(model: Model, shape: BlockShape) -> list[Choice]:
    stage = model.stage
    if stage is None:
        return []
    return [
        Choice(
            name=f"rank {stage.group.rank} of {stage.group.size}",
            value=f"layers {stage.first} to {stage.end - 1} of {stage.num_layers}",
            reason=f"{shape.waves} waves of batches are at different ranks at the same time",
        )
    ]
