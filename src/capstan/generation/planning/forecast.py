"""What a job will move and how long it will take: the block schedule, played on lengths alone.

Bytes are exact as long as every sequence generates all its tokens: the same `Block` that the engine runs
decides who sits where, and each visit's traffic follows from the placement. Seconds are a model. Beside an
accelerator, resources work at the same time, and a sweep takes

    max(seconds of the busiest resource, (device + host attention) / batches) + overlap lost + boundary

since each batch passes through device and host in turn. With room for two layers only, the next one's weights
cannot cross while the last batches of this one are attended, which loses about a batch's share of the shorter
of the two; and where weights are decoded, the next layer cannot begin before this one has ended, so device
and host take turns. Between two sweeps Python works alone: tokens are chosen, and each batch's hidden states
made. Where a slice of host memory plays the device, copies are made by the processor that computes:

    device + host attention + copies, or disk if that is longer
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from capstan.generation.model import Model
from capstan.generation.planning.batching import BatchWork, Block, BlockShape, Length
from capstan.generation.planning.placement import Placement, Tier
from capstan.generation.planning.rank_traffic import rank_links_s, rank_traffic
from capstan.generation.planning.resources import (
    DEVICE_COMPUTE,
    DEVICE_TO_HOST,
    DISK_TO_HOST,
    HOST_ATTENTION,
    HOST_MEMORY,
    HOST_TO_DEVICE,
    HOST_TO_DISK,
)
from capstan.hardware import Machine
from capstan.plans import Phase, Traffic

# Shares of what the probe measures, seen on an H200. A model's layers do not multiply at the rate of one
# product alone; attention over rows on the device does not read at the rate of one long copy; a link is
# slower while the host attends.
_PRODUCT_SHARE = 0.7
_ROWS_SHARE = 0.35
_LINK_SHARE = 0.9
# What a decode step's kernels take for one layer, however little they do, and the part of the time for
# dispatching a layer that replaying a recorded step takes.
_STEP_S = 6e-5
_REPLAY_SHARE = 0.12

# A prefix's rows stay in the processor's caches while sequence after sequence attends them, which still
# takes this share of what reading them from memory would.
_PREFIX_SHARE = 0.7

# Handing a visit over to the host's threads and taking its result back.
_HANDOVER_S = 2e-4

# Host memory is read by its processors and by the links at the same time.


class SweepSize(NamedTuple):
    """What determines a sweep's cost."""

    batches: int = 1
    tokens: int = 0
    decoding: int = 0  # sequences that decode
    rows_read: int = 0  # cached rows that they read after the prefix, their own new ones apart
    decoding_on_host: int = 0  # those of the two whose batches are attended on the host where
    rows_read_on_host: int = 0  # their cache is not on the device
    prefix_rows: int = 0  # of the prefix that all begin with
    prefix_crossings: int = 0  # visits of a layer for which it crosses to the device
    prefix_tokens: int = 0  # of the prefix, if this sweep computes it
    chunks: int = 0
    prompt_chunks: int = 0  # those of the chunks that are of prompts
    prompt_square: int = 0  # scores of prompts, for attention's arithmetic
    waves: int = 1  # times that the weights are brought

    @property
    def rows_attended_on_host(self) -> float:
        """Rows that take as long to attend as those that the host attends, the prefix's among them."""
        return self.rows_read_on_host + _PREFIX_SHARE * self.decoding_on_host * self.prefix_rows


def size_of(works: Sequence[BatchWork], on_host: frozenset[int], prefix: int) -> SweepSize:
    """The size of a sweep in which the batches `on_host` are attended there."""
    chunks = [(work.batch, chunk) for work in works for chunk in work.chunks]
    decoding = [(batch, work) for batch, chunk in chunks if not chunk.is_prefill for work in chunk.works]
    prompts = [work for _, chunk in chunks if chunk.is_prefill for work in chunk.works]
    hosted = [work for batch, work in decoding if batch in on_host]
    # For each chunk of prompts that follow it, and for each batch whose decoding rows cross.
    crossings = len([chunk for _, chunk in chunks if chunk.is_prefill and chunk.works[0].start])
    crossings += len({batch for batch, _ in decoding if batch not in on_host})
    return SweepSize(
        batches=len(works),
        tokens=sum(chunk.num_tokens for _, chunk in chunks),
        decoding=len(decoding),
        rows_read=sum(work.start - prefix for _, work in decoding),
        decoding_on_host=len(hosted),
        rows_read_on_host=sum(work.start - prefix for work in hosted),
        prefix_rows=prefix,
        prefix_crossings=crossings if prefix else 0,
        prefix_tokens=sum(work.count for work in prompts if work.is_prefix),
        chunks=len(chunks),
        prompt_chunks=len([chunk for _, chunk in chunks if chunk.is_prefill]),
        prompt_square=sum(work.count * (work.count + 2 * work.start) for work in prompts),
    )


def weights_traffic(model: Model, placement: Placement) -> Traffic:
    """Bytes of weights that one sweep streams, the embedding's rows apart."""
    moved = {HOST_TO_DEVICE: 0, DISK_TO_HOST: 0}
    for unit in model.manifest.units:
        for tensor in unit:
            tier = placement.weights[tensor.name]
            moved[HOST_TO_DEVICE] += tensor.stored_bytes if tier != "device" else 0
            moved[DISK_TO_HOST] += tensor.stored_bytes if tier == "disk" else 0
    return Traffic({(link, "weights"): count for link, count in moved.items()})


def sweep_traffic(model: Model, placement: Placement, size: SweepSize, *, keeps_cache: bool) -> Traffic:
    """Bytes that one sweep moves, by link and content."""
    parts, manifest = [size.waves * weights_traffic(model, placement)], model.manifest
    if manifest.holds_table:
        rows = size.tokens * manifest.row_bytes
        parts.append(_in_from(placement.weights[manifest.table.name], "weights", rows))
    if keeps_cache:
        for layout, tier in zip(model.formats, placement.cache, strict=True):
            if tier == "device":
                continue
            new = (size.tokens - size.prefix_tokens) * layout.row_bytes
            parts.append(_out_to(tier, "cache", new))
            crossing = (size.rows_read - size.rows_read_on_host) * layout.row_bytes
            parts.append(_in_from(tier, "cache", crossing))
            # A prefix rests on the host even where the rows after it are on disk.
            parts.append(_out_to("host", "cache", size.prefix_tokens * layout.row_bytes))
            prefixes = size.prefix_crossings * size.prefix_rows
            parts.append(_in_from("host", "cache", prefixes * layout.row_bytes))
            staying = size.rows_read_on_host * layout.row_bytes
            parts.append(Traffic({(DISK_TO_HOST, "cache"): staying if tier == "disk" else 0}))
            geometry, itemsize = layout.geometry, model.profile.itemsize
            each = size.decoding_on_host * geometry.num_query_heads * itemsize
            parts.append(Traffic({(DEVICE_TO_HOST, "activations"): each * geometry.key_size}))
            parts.append(Traffic({(HOST_TO_DEVICE, "activations"): each * geometry.value_size}))
    hidden = (model.num_layers + 1) * size.tokens * model.hidden_bytes
    parts.append(_in_from(placement.activations, "activations", hidden))
    parts.append(_out_to(placement.activations, "activations", hidden))
    return Traffic.total(parts)


def _in_from(tier: Tier, content: str, size_bytes: int) -> Traffic:
    links = {"device": (), "host": (HOST_TO_DEVICE,), "disk": (DISK_TO_HOST, HOST_TO_DEVICE)}[tier]
    return Traffic({(link, content): size_bytes for link in links})


def _out_to(tier: Tier, content: str, size_bytes: int) -> Traffic:
    links = {"device": (), "host": (DEVICE_TO_HOST,), "disk": (DEVICE_TO_HOST, HOST_TO_DISK)}[tier]
    return Traffic({(link, content): size_bytes for link in links})


class Rates(NamedTuple):
    """The machine, and how fast its host attends rows of this model, in bytes per second."""

    machine: Machine
    host_attention: float


def sweep_busy_s(
    model: Model, placement: Placement, size: SweepSize, traffic: Traffic, rates: Rates
) -> dict[str, float]:
    """Seconds for which each resource is busy in a sweep."""
    machine = rates.machine
    device, host = machine.device("device"), machine.device("host")
    rate = flops_rate(model, machine)
    flops = sum(layer.flops_per_token for layer in model.profile.layers) * size.tokens
    head = sum(each.spec.num_elements for each in model.manifest.units[-1])
    flops += 2 * head * max(size.decoding, size.chunks)
    weight_bytes = sum(each.computed_bytes for unit in model.manifest.units for each in unit)
    # A unit's weights are read from device memory by every chunk, and written once when they are decoded.
    touched = size.chunks * weight_bytes
    touched += 2 * size.waves * sum(each.decoded_bytes for unit in model.manifest.units for each in unit)
    on_device = on_host = layers_on_host = 0
    attended = 0.0  # on the host
    for layout, tier in zip(model.formats, placement.cache, strict=True):
        geometry = layout.geometry
        flops += 2 * size.prompt_square * geometry.num_query_heads * geometry.key_size
        hosted = size.rows_read_on_host if tier != "device" else 0
        on_host += hosted * layout.row_bytes
        attended += size.rows_attended_on_host * layout.row_bytes if tier != "device" else 0.0
        shared = (size.decoding - (size.decoding_on_host if tier != "device" else 0)) * size.prefix_rows
        decoded_bytes = 0 if layout.is_plain else 2 * geometry.cached_elements * model.profile.itemsize
        on_device += (size.rows_read - hosted + shared) * (layout.row_bytes + decoded_bytes)
        layers_on_host += tier != "device"
    busy = {link: machine_link_s(machine, link, traffic.on(link)) for link in traffic.links}
    memory_rate = device.memory_bandwidth_bytes_per_s
    prompts, steps = size.prompt_chunks, size.chunks - size.prompt_chunks
    if device.kind == "cpu":
        computed_s = max(flops / rate, (touched + on_device) / memory_rate)
        busy[DEVICE_COMPUTE] = computed_s + size.chunks * model.num_layers * model.profile.dispatch_s
    else:
        computed_s = max(flops / (_PRODUCT_SHARE * rate), touched / memory_rate)
        computed_s += on_device / (_ROWS_SHARE * memory_rate) + steps * model.num_layers * _STEP_S
        # It computes one operation while the next is being dispatched.
        dispatched = model.num_layers * (prompts + _REPLAY_SHARE * steps)
        busy[DEVICE_COMPUTE] = max(computed_s, dispatched * model.profile.dispatch_s)
        if on_host and HOST_TO_DEVICE in busy:
            busy[HOST_TO_DEVICE] /= _LINK_SHARE
    if on_host:
        visits = layers_on_host * len(placement.host_batches(size.batches))
        busy[HOST_ATTENTION] = attended / rates.host_attention + visits * _HANDOVER_S
    if device.kind != "cpu":
        crossing = traffic.on(HOST_TO_DEVICE) + traffic.on(DEVICE_TO_HOST)
        busy[HOST_MEMORY] = (on_host + crossing) / host.memory_bandwidth_bytes_per_s
    return busy


def flops_rate(model: Model, machine: Machine) -> float:
    """Operations per second of matrix products in the model's dtype on the device."""
    rates = machine.device("device").matmul_flops_per_s
    name = str(model.meta_model.compute_dtype).removeprefix("torch.")
    return rates.get(name) or rates["float32"]


def machine_link_s(machine: Machine, link: str, size_bytes: int) -> float:
    """Seconds that a link needs for so many bytes."""
    source, _, target = link.partition("->")
    return machine.link(source, target).seconds(size_bytes) if size_bytes else 0.0


def wall_s(
    busy_s: dict[str, float], model: Model, placement: Placement, size: SweepSize, machine: Machine
) -> float:
    """Seconds of a sweep in which resources are busy for so long (the formulas above)."""
    if machine.device("device").kind != "cpu":
        device, host = busy_s[DEVICE_COMPUTE], busy_s.get(HOST_ATTENTION, 0.0)
        longest = max(*busy_s.values(), (device + host) / size.batches)
        longest += (size.chunks + 2) * model.profile.dispatch_s
        if placement.ring_slots > 2 or not host:
            return longest
        if any(each.decoded_bytes for unit in model.manifest.units for each in unit):
            return max(longest, host + device)
        lost = min(host, busy_s.get(HOST_TO_DEVICE, 0.0)) / size.batches
        return longest + (lost if size.batches > 1 else 0.0)
    disk = max((seconds for name, seconds in busy_s.items() if "disk" in name), default=0.0)
    return max(disk, sum(seconds for name, seconds in busy_s.items() if "disk" not in name))


@dataclass
class _Sum:
    """Grows into a `Phase`."""

    seconds: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
    traffic: list[Traffic] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, busy_s: Mapping[str, float], seconds: float, traffic: Traffic, num_tokens: int) -> None:
        self.seconds += seconds
        for name, spent in busy_s.items():
            self.busy_s[name] = self.busy_s.get(name, 0.0) + spent
        self.traffic.append(traffic)
        self.num_tokens += num_tokens

    def phase(self, name: str) -> Phase:
        return Phase(
            name=name,
            seconds=self.seconds,
            busy_s=self.busy_s,
            traffic=Traffic.total(self.traffic),
            counts={"tokens": self.num_tokens},
        )


PREFILL, DECODE = "prefill", "decode"


def forecast(
    model: Model,
    placement: Placement,
    shape: BlockShape,
    lengths: Sequence[Length],
    rates: Rates,
    *,
    keeps_cache: bool = True,
) -> tuple[Phase, ...]:
    """Play the job: sweeps in which prompts start make up the phase "prefill", the others "decode".

    A phase counts generated tokens.
    """
    return phases_of(play(model, placement, shape, lengths, rates, keeps_cache=keeps_cache))


def play(
    model: Model,
    placement: Placement,
    shape: BlockShape,
    lengths: Sequence[Length],
    rates: Rates,
    *,
    keeps_cache: bool = True,
) -> Iterator[Phase]:
    """Every sweep of a job, as a phase by itself; one that takes nothing where a wave has nothing to do."""
    block = Block(shape, lengths)
    on_host = placement.host_batches(len(shape.batches))
    for works in block.turns():
        if not works:
            yield Phase(name=DECODE, seconds=0.0)
            continue
        size = size_of(works, on_host, shape.prefix)
        traffic = sweep_traffic(model, placement, size, keeps_cache=keeps_cache)
        busy_s = sweep_busy_s(model, placement, size, traffic, rates)
        seconds = wall_s(busy_s, model, placement, size, rates.machine)
        if model.stage is not None:
            passing = rank_traffic(
                model.stage, works, hidden_bytes=model.hidden_bytes, keeps_cache=keeps_cache
            )
            traffic, busy_s = traffic + passing, busy_s | rank_links_s(model.stage, passing)
        chunks = [chunk for work in works for chunk in work.chunks]
        num_new = sum(not work.is_prefix for chunk in chunks for work in chunk.works) if keeps_cache else 0
        yield Phase(
            name=PREFILL if any(chunk.is_prefill for chunk in chunks) else DECODE,
            seconds=seconds,
            busy_s=busy_s,
            traffic=traffic,
            counts={"tokens": num_new},
        )
        block.advance()


def phases_of(sweeps: Iterable[Phase]) -> tuple[Phase, ...]:
    """Sweeps of the same name put together."""
    sums = {PREFILL: _Sum(), DECODE: _Sum()}
    for sweep in sweeps:
        if sweep.traffic.links or sweep.busy_s:
            sums[sweep.name].add(sweep.busy_s, sweep.seconds, sweep.traffic, sweep.counts["tokens"])
    return tuple(part.phase(name) for name, part in sums.items() if part.traffic)
