"""The memory model: what a placement and a block take on each tier, at most.

Every term is a buffer that the engine allocates with exactly that size, or an upper bound of temporary
tensors. The engine allocates nothing else that grows with the model or the block.

    device = weights that rest there + a ring for streamed units + decoded units
           + cache that rests there + a ring for rows that cross + hidden states
           + layer arguments of all tokens in flight + what stopped batches keep
           + workspace of one layer over one chunk
    host   = weights that rest there + cache that rests there + staging for disk
           + rows, queries and results on their way
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from capstan.codecs import Identity
from capstan.errors import DoesNotFit
from capstan.generation.attention.host_attention import reads_in_place, scratch_bytes
from capstan.generation.attention.packed import workspace_bytes
from capstan.generation.attention.row_format import RowFormat
from capstan.generation.model import Model
from capstan.generation.planning.activation_buffers import activation_buffers, outbox_bytes
from capstan.generation.planning.batching import BlockShape, Length
from capstan.generation.planning.cache_buffers import (
    ROWS_IN_FLIGHT,
    cache_buffers,
    prefix_bytes,
    region_bytes,
)
from capstan.generation.planning.placement import Placement, Tier
from capstan.generation.planning.weight_buffers import buffers_for
from capstan.plans import bytes_text
from capstan.storage.slab import aligned

# What sampling holds for each logit: the logits, their float32 copy, sorted values (4) and order (8),
# probabilities, cumulated (4 each), masks. On CUDA, sorting holds its keys and values twice: on an H100,
# vocabularies of 32,000 to 152,000 took 56 to 58 bytes, and 60 to 61 with bans or penalties.
SAMPLING_BYTES_PER_LOGIT = {"cpu": 40, "cuda": 64}
_GRANT: Mapping[Tier, str] = {
    "device": "Grant more with --device-memory",
    "host": "Grant more with --host-memory",
    "disk": "Name a folder that has room with --disk",
}
_SMALL_TENSORS_BYTES = 256 << 10  # token ids, positions, masks, indices


class Extent(NamedTuple):
    """The most tokens that are in flight at once, for a block and the sequences that will pass through it."""

    sweep_tokens: int
    batch_tokens: int
    chunk_tokens: int
    longest_prompt: int


def extent_of(shape: BlockShape, lengths: Sequence[Length]) -> Extent:
    """Whatever the order in which sequences come and go: in one sweep, the slots hold different sequences,
    so at most the longest prompts, one for each slot, are in flight."""
    prompts = sorted((length.prompt - shape.prefix for length in lengths), reverse=True)
    most_slots = max(batch.slots for batch in shape.batches)
    batch_tokens = max(shape.prefix, sum(prompts[:most_slots]))
    return Extent(
        sweep_tokens=max(shape.prefix, sum(prompts[: shape.slots_at_once])),
        batch_tokens=batch_tokens,
        chunk_tokens=min(
            max(shape.chunk_tokens, prompts[0], shape.prefix, most_slots), max(batch_tokens, most_slots)
        ),
        longest_prompt=shape.prefix + prompts[0],
    )


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Bytes needed on each tier, and what they are for."""

    parts: Mapping[Tier, Mapping[str, int]] = field(default_factory=dict)

    def on(self, tier: Tier) -> int:
        """All bytes needed on a tier."""
        return sum(self.parts.get(tier, {}).values())

    def require(self, granted: Mapping[Tier, int]) -> None:
        """Raise `DoesNotFit`, naming the largest parts, unless every tier has what it needs."""
        for tier, limit in granted.items():
            if self.on(tier) > limit:
                largest = sorted(self.parts[tier].items(), key=lambda part: -part[1])[:4]
                listing = ", ".join(f"{name} {bytes_text(size)}" for name, size in largest if size)
                raise DoesNotFit(
                    f"The {tier} needs {bytes_text(self.on(tier))} and was granted {bytes_text(limit)} "
                    f"({listing}). {_GRANT[tier]}, use fewer bits (--weight-bits 4, --cache-bits 4), or "
                    "shorten prompts and max_tokens."
                )


def demand_of(
    model: Model,
    placement: Placement,
    shape: BlockShape,
    lengths: Sequence[Length],
    *,
    logit_rows: int,
    on_cuda: bool,
    keeps_cache: bool = True,
) -> Demand:
    """What `model` takes with this placement and block."""
    extent = extent_of(shape, lengths)
    weights = buffers_for(model.manifest, placement.weights, ring_slots=placement.ring_slots)
    cache = cache_buffers(model.formats, placement, shape, tokens=extent.chunk_tokens)
    hidden = activation_buffers(
        placement.activations,
        sweep_bytes=extent.sweep_tokens * model.hidden_bytes,
        batch_bytes=extent.batch_tokens * model.hidden_bytes,
    )

    def resting(tier: Tier) -> int:
        placed = model.manifest.placeable.values()
        return sum(aligned(each.stored_bytes) for each in placed if placement.weights[each.name] == tier)

    def cached(tier: Tier) -> int:
        if not keeps_cache:
            return 0
        parts = (model.formats, placement.cache, shape, tier)
        return region_bytes(*parts) + (prefix_bytes(*parts) if tier != "disk" else 0)

    device = {
        "weights at rest": resting("device"),
        "norms and positions": sum(aligned(each.computed_bytes) for each in model.manifest.rest),
        "buffers for arriving weights": weights.device_bytes,
        "KV cache": cached("device"),
        "buffers for arriving cache": cache.device_bytes if keeps_cache else 0,
        "hidden states": hidden.device_bytes,
        "hidden states for the next rank": outbox_bytes(
            model.stage, sweep_bytes=extent.sweep_tokens * model.hidden_bytes
        ),
        "layer arguments": extent.sweep_tokens * model.profile.call_bytes_per_token,
        "stopped batches": shape.num_slots * _stopped_bytes(model, placement) if keeps_cache else 0,
        "workspace": workspace_of(model, placement, shape, extent, logit_rows=logit_rows),
        "recorded steps": _TAPE_BYTES * len(shape.batches) if on_cuda and keeps_cache else 0,
        "libraries": _CUDA_LIBRARIES_BYTES if on_cuda else 0,
    }
    host = {
        "weights at rest": resting("host"),
        "staging for weights": weights.host_bytes,
        "KV cache": cached("host"),
        "staging for cache": cache.host_bytes if keeps_cache else 0,
        "hidden states": hidden.host_bytes,
        "attention": _host_attention_bytes(model, placement, shape) if keeps_cache else 0,
    }
    disk = {
        "weights in fewer bits": sum(
            aligned(each.stored_bytes)
            for each in model.manifest.placeable.values()
            if placement.weights[each.name] == "disk" and not each.is_as_in_checkpoint
        ),
        "KV cache": cached("disk"),
        "hidden states": hidden.disk_bytes,
    }
    return Demand(parts={"device": device, "host": host, "disk": disk})


# cuBLAS keeps a workspace of 32 MiB on Hopper, and torch's allocator rounds blocks up.
_CUDA_LIBRARIES_BYTES = 96 << 20
# Intermediate values of a batch's recorded decode steps: torch's allocator takes at least so much for them.
_TAPE_BYTES = 24 << 20


def workspace_of(
    model: Model, placement: Placement, shape: BlockShape, extent: Extent, *, logit_rows: int
) -> int:
    """Temporary device memory of the hungriest step: the front, one layer over one chunk, or the logits."""
    itemsize = model.profile.itemsize
    tokens = extent.chunk_tokens
    front = tokens * (3 * model.manifest.row_bytes + 6 * model.hidden_bytes)
    layer = model.profile.workspace_bytes(tokens) + _attention_bytes(model, placement, shape, extent)
    vocabulary = model.meta_model.vocabulary_size
    sampling = SAMPLING_BYTES_PER_LOGIT[model.formats[0].device_type]
    back = logit_rows * (vocabulary * (itemsize + sampling) + 8 * model.hidden_bytes)
    return max(front, layer, back) + _SMALL_TENSORS_BYTES


def _stopped_bytes(model: Model, placement: Placement) -> int:
    """What a decoding sequence keeps on the device while its batch is stopped inside its attention."""
    away = [layout for layout, tier in zip(model.formats, placement.cache, strict=True) if tier != "device"]
    widths = [layout.row_bytes + 2 * _query_bytes(layout, model.profile.itemsize) for layout in away]
    return 4 * model.hidden_bytes + max(widths) if widths else 0


def _query_bytes(layout: RowFormat, itemsize: int) -> int:
    geometry = layout.geometry
    return geometry.num_query_heads * max(geometry.key_size, geometry.value_size) * itemsize


def _attention_bytes(model: Model, placement: Placement, shape: BlockShape, extent: Extent) -> int:
    most = 0
    on_host = placement.host_batches(len(shape.batches))
    for layout, tier in set(zip(model.formats, placement.cache, strict=True)):
        inside = 0
        in_place = layout.device_type == "cpu" and reads_in_place(layout, layout.dtype)
        for index, batch in enumerate(shape.batches):
            decodes = (tier == "device" or index not in on_host) and not in_place
            inside = max(
                inside,
                workspace_bytes(
                    layout.geometry,
                    longest_prompt=extent.longest_prompt,
                    num_decoding=batch.slots if decodes else 0,
                    num_rows=batch.capacity,
                    itemsize=model.profile.itemsize,
                    device_type=layout.device_type,
                )
                + (layout.decoded_bytes(batch.slots * batch.capacity) if decodes else 0),
            )
        if layout.device_type == "cpu" and (in_place or tier != "device"):
            # Where a slice of host memory plays the device, the host's attention works in that slice too.
            inside += _host_scratch_bytes(layout, shape)
        if shape.prefix:  # decoded, and joined to a prompt's own keys and values
            joined = (shape.prefix + extent.longest_prompt) * layout.geometry.cached_elements
            mask = 4 * extent.longest_prompt * (extent.longest_prompt - shape.prefix)
            inside += layout.decoded_bytes(shape.prefix) + joined * model.profile.itemsize + mask
        # New keys and values made contiguous, encoded, and joined to rows.
        elements = extent.chunk_tokens * layout.geometry.cached_elements
        encoding = elements * (model.profile.itemsize + (0 if isinstance(layout.codec, Identity) else 16))
        rows = (2 + ROWS_IN_FLIGHT) * extent.chunk_tokens * layout.row_bytes
        # The packed result, and on device=host machines its copy.
        result = 2 * extent.chunk_tokens * _query_bytes(layout, model.profile.itemsize)
        most = max(most, inside + encoding + rows + result)
    return most


def _host_scratch_bytes(layout: RowFormat, shape: BlockShape) -> int:
    return max(scratch_bytes(layout, slots=batch.slots, rows=batch.capacity) for batch in shape.batches)


def _host_attention_bytes(model: Model, placement: Placement, shape: BlockShape) -> int:
    if not placement.host_batches(len(shape.batches)):
        return 0
    pairs = zip(model.formats, placement.cache, strict=True)
    away = {layout for layout, tier in pairs if tier != "device"}
    return max((_host_scratch_bytes(layout, shape) for layout in away), default=0)
