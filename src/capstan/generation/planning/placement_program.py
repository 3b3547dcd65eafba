"""The integer program inside the planner: where whole tensors and whole layers of cache lie.

    minimise    seconds of one decode sweep
    over        n[kind, tier]   how many of the layers' tensors of a kind rest on a tier
                c[tier]         how many layers' caches rest on a tier
    subject to  memory of device, host and disk as in memory.py, buffers included
                seconds >= what each link, the processors and host memory need, as in forecast.py

Source: FlexGen, section 4.3 and appendix A.3, arXiv 2303.06865.
Differs: the paper's program is over fractions, which its runtime then rounds; what is chosen here is what
runs, and the buffers that streaming needs are part of the program.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from capstan.generation.model import Model
from capstan.generation.planning.batching import BlockShape
from capstan.generation.planning.cache_buffers import region_rows
from capstan.generation.planning.forecast import Rates, SweepSize, sweep_busy_s, sweep_traffic
from capstan.generation.planning.memory import Demand
from capstan.generation.planning.placement import TIERS, Placement, Tier
from capstan.generation.planning.resources import (
    DEVICE_COMPUTE,
    DEVICE_TO_HOST,
    DISK_TO_HOST,
    HOST_ATTENTION,
    HOST_MEMORY,
    HOST_TO_DEVICE,
)
from capstan.generation.planning.weight_buffers import buffers_for
from capstan.hardware import Machine
from capstan.models.weight_manifest import StoredTensor
from capstan.plans import IntegerProgram
from capstan.storage.slab import aligned

Terms = dict[str, float]
DEVICE: Tier = "device"
HOST: Tier = "host"
DISK: Tier = "disk"


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the program is solved for: a block, and a draft whose fixed parts it keeps.

    `demand_of` is the memory model for this block and its sequences.
    """

    model: Model
    rates: Rates
    budgets: Mapping[Tier, int]
    shape: BlockShape
    draft: Placement
    fixes_weights: bool
    fixes_cache: bool
    demand_of: Callable[[Placement], Demand]
    relaxed: bool = False  # fractions of tensors and layers, rounded: for comparing blocks quickly

    @property
    def machine(self) -> Machine:
        return self.rates.machine

    def with_open_parts_on(self, tier: Tier) -> Placement:
        """The draft with everything that the program decides on one tier."""
        weights, cache = self.draft.weights, self.draft.cache
        return replace(
            self.draft,
            weights=weights if self.fixes_weights else dict.fromkeys(weights, tier),
            cache=cache if self.fixes_cache else (tier,) * len(cache),
        )


def solve_placement(given: Given) -> Placement:
    """The placement with the fastest decode sweep.

    Raises:
        DoesNotFit: there is none within the budgets.
    """
    build = _Build(given)
    if not given.fixes_weights:
        build.weights()
    if not given.fixes_cache:
        build.cache()
    return build.solve()


class _Build:
    """Collects variables, memory and seconds, then solves.

    `use[tier]` and `spend[resource]` are linear terms: bytes on a tier, seconds of a resource.
    """

    def __init__(self, given: Given) -> None:
        self.given = given
        self.program = IntegerProgram()
        self.kinds = _kinds(given.model)
        self.use: dict[Tier, Terms] = {tier: {} for tier in TIERS}
        self.spend: dict[str, Terms] = {
            name: {} for name in (HOST_TO_DEVICE, DEVICE_TO_HOST, DISK_TO_HOST, HOST_ATTENTION, HOST_MEMORY)
        }
        self.fixed = self._fixed_bytes()
        batches = given.shape.batches
        prefix = given.shape.prefix
        self.rows = sum(batch.slots * (batch.capacity - prefix) for batch in batches)
        self.row_bytes = max(layout.row_bytes for layout in given.model.formats)
        # A decode sweep late in the job, when caches are nearly full.
        on_host = given.draft.host_batches(len(batches))
        slots, hosted = given.shape.num_slots, [batches[index] for index in on_host]
        self.size = SweepSize(
            batches=len(batches),
            tokens=slots,
            decoding=slots,
            rows_read=int(0.9 * self.rows),
            decoding_on_host=sum(batch.slots for batch in hosted),
            rows_read_on_host=int(0.9 * sum(batch.slots * (batch.capacity - prefix) for batch in hosted)),
            prefix_rows=prefix,
            chunks=len(batches),
            waves=given.shape.waves,
        )

    def _fixed_bytes(self) -> dict[Tier, int]:
        """Bytes that do not depend on the variables, from the memory model itself."""
        given = self.given
        far, near = (given.demand_of(given.with_open_parts_on(tier)) for tier in ("disk", "device"))
        open_parts: dict[Tier, set[str]] = {"device": set(), "host": set(), "disk": set()}
        if not given.fixes_weights:
            open_parts["device"] |= {"buffers for arriving weights"}
            open_parts["host"] |= {"staging for weights"}
            open_parts["disk"] |= {"weights in fewer bits"}
        if not given.fixes_cache:
            open_parts["device"] |= {"buffers for arriving cache", "stopped batches"}
            open_parts["host"] |= {"staging for cache"}
            open_parts["disk"] |= {"KV cache"}
        fixed = {
            tier: far.on(tier) - sum(far.parts[tier][name] for name in open_parts[tier]) for tier in TIERS
        }
        # A cache that stays on the device is attended there, which takes more workspace.
        fixed["device"] += max(0, near.parts["device"]["workspace"] - far.parts["device"]["workspace"])
        if not given.fixes_weights:
            nowhere = dict.fromkeys(given.draft.weights, DEVICE)
            slots = given.draft.ring_slots
            fixed["device"] += buffers_for(given.model.manifest, nowhere, ring_slots=slots).device_bytes
        return fixed

    # --- variables ---------------------------------------------------------------------------------------

    def _count(self, what: str, total: int) -> dict[Tier, str]:
        """Integer variables for how many of `total` things rest on each tier."""
        names: dict[Tier, str] = {tier: f"{what} on {tier}" for tier in TIERS}
        for name in names.values():
            self.program.variable(name, high=total, integer=True)
        self.program.equal(dict.fromkeys(names.values(), 1.0), total)
        return names

    def _whether_any(self, flag: str, names: list[str], total: int) -> str:
        """A 0-1 variable that is 1 as soon as any of the counts is not 0."""
        self.program.variable(flag, high=1, integer=True)
        self.program.at_most({**dict.fromkeys(names, 1.0), flag: -float(total)}, 0.0)
        return flag

    def weights(self) -> None:
        """Tensors by kind, and the two rings through which they stream: a slot holds the largest unit's
        streamed part, a layer's or the head's."""
        manifest, program = self.given.model.manifest, self.program
        head = manifest.head.name if manifest.head else None
        slots: dict[str, dict[bool, Terms]] = {name: {True: {}, False: {}} for name in ("device", "host")}
        for kind, tensors in self.kinds.items():
            size, total = aligned(tensors[0].stored_bytes), len(tensors)
            names = self._count(kind, total)
            self.use["device"][names["device"]] = size
            self.use["host"][names["host"]] = size
            self.use["disk"][names["disk"]] = 0 if tensors[0].is_as_in_checkpoint else size
            if kind == manifest.table.name != head:  # only its rows ever move
                self._stream(names, self.size.tokens * manifest.row_bytes)
                continue
            self._stream(names, size * self.size.waves)
            is_head = kind == head
            away = self._whether_any(f"{kind} streams", [names["host"], names["disk"]], total)
            slots["device"][is_head][away] = size
            read = self._whether_any(f"{kind} is read", [names["disk"]], total)
            slots["host"][is_head][read] = size
        for tier in ("device", "host"):
            slot = f"slot on {tier}"
            program.variable(slot)
            self.use[tier][slot] = float(self.given.draft.ring_slots) if tier == "device" else 2.0
            for terms in slots[tier].values():
                program.at_most({**terms, slot: -1.0}, 0.0)

    def _stream(self, names: Mapping[Tier, str], size_bytes: int) -> None:
        for tier in ("host", "disk"):
            self._crosses(HOST_TO_DEVICE, names[tier], size_bytes)
        self.spend[DISK_TO_HOST][names["disk"]] = self._link_s("disk", "host", size_bytes)

    def _crosses(self, link: str, name: str, size_bytes: int) -> None:
        """Each thing counted by `name` takes so many bytes over a link, out of or into host memory."""
        source, _, target = link.partition("->")
        self._add(link, name, self._link_s(source, target, size_bytes))
        self._add(HOST_MEMORY, name, size_bytes / self._host_bandwidth)

    def _add(self, resource: str, name: str, seconds: float) -> None:
        self.spend[resource][name] = self.spend[resource].get(name, 0.0) + seconds

    @property
    def _host_bandwidth(self) -> float:
        return self.given.machine.device("host").memory_bandwidth_bytes_per_s

    def cache(self) -> None:
        """Layers of cache, all of the widest row, and their buffers."""
        given, size = self.given, self.size
        shape, num_layers = given.shape, given.model.num_layers
        region = {
            tier: sum(
                aligned(batch.slots * region_rows(shape, index, tier) * self.row_bytes)
                for index, batch in enumerate(shape.batches)
            )
            for tier in TIERS
        }
        prefix = aligned(shape.prefix * self.row_bytes)
        hosted, attended = (
            size.rows_read_on_host * self.row_bytes,
            size.rows_attended_on_host * self.row_bytes,
        )
        crossing, written = size.rows_read * self.row_bytes - hosted, size.tokens * self.row_bytes
        names = self._count("cache", num_layers)
        for tier in TIERS:
            self.use[tier][names[tier]] = region[tier] + (prefix if tier != "disk" else 0)
        self.use["host"][names["disk"]] = prefix
        away = self._whether_any("cache is away", [names["host"], names["disk"]], num_layers)
        read = self._whether_any("cache is read", [names["disk"]], num_layers)
        far: dict[Tier, Demand] = {
            tier: given.demand_of(replace(given.draft, cache=(tier,) * num_layers)) for tier in (HOST, DISK)
        }
        device, host = far[HOST].parts["device"], far[HOST].parts["host"]
        self.use["device"][away] = device["buffers for arriving cache"] + device["stopped batches"]
        self.use["host"][away] = host["staging for cache"]
        self.use["host"][read] = far[DISK].parts["host"]["staging for cache"] - host["staging for cache"]
        for name in (names["host"], names["disk"]):
            self._crosses(DEVICE_TO_HOST, name, written)
            self._crosses(HOST_TO_DEVICE, name, crossing)
            self._add(HOST_ATTENTION, name, attended / given.rates.host_attention)
            self._add(HOST_MEMORY, name, hosted / self._host_bandwidth)
        self.spend[DISK_TO_HOST][names["disk"]] = self._link_s(
            "disk", "host", size.rows_read * self.row_bytes
        )

    def _link_s(self, source: str, target: str, size_bytes: float) -> float:
        return size_bytes / self.given.machine.link(source, target).bandwidth_bytes_per_s

    # --- solving -----------------------------------------------------------------------------------------

    def solve(self) -> Placement:
        """Minimise the seconds of a sweep; among equals, what moves least: links have other users."""
        for tier in TIERS:
            self.program.at_most(self.use[tier], self.given.budgets[tier] - self.fixed[tier])
        self.program.variable("seconds")
        for terms, constant in self._times():
            self.program.at_most({**terms, "seconds": -1.0}, -constant)
        cost: Terms = {"seconds": 1.0}
        for link in (HOST_TO_DEVICE, DISK_TO_HOST):
            for name, seconds in self.spend[link].items():
                cost[name] = cost.get(name, 0.0) + 1e-3 * seconds
        found = self._realise(self.program.minimise(cost, relaxed=self.given.relaxed))
        return found if self.given.relaxed or self.given.fixes_weights else self._off_the_disk(found)

    def _off_the_disk(self, found: Placement) -> Placement:
        """Weights that host memory has room for rest there: the solver stops within a small gap of the
        optimum, and a few small tensors on disk cost less than that."""
        given = self.given
        sizes = {
            tensor.name: tensor.stored_bytes
            for tensors in self.kinds.values()
            for tensor in tensors
            if found.weights[tensor.name] == DISK
        }
        smallest_first = sorted(sizes, key=lambda name: sizes[name])

        def with_on_host(count: int) -> Placement:
            moved = dict.fromkeys(smallest_first[:count], HOST)
            return replace(found, weights={**found.weights, **moved})

        def is_too_many(count: int) -> bool:
            demand = given.demand_of(with_on_host(count))
            return any(demand.on(tier) > given.budgets[tier] for tier in TIERS)

        counts = range(1, len(smallest_first) + 1)
        return with_on_host(bisect_left(counts, True, key=is_too_many))

    def _times(self) -> Iterator[tuple[Terms, float]]:
        """What the seconds of a sweep must reach: terms in the variables, and a constant."""
        given, near = self.given, self.given.with_open_parts_on("device")
        traffic = sweep_traffic(given.model, near, self.size, keeps_cache=True)
        busy_s = sweep_busy_s(given.model, near, self.size, traffic, given.rates)
        yield self.spend[DISK_TO_HOST], busy_s.get(DISK_TO_HOST, 0.0)
        if given.machine.device("device").kind != "cpu":
            for name in (HOST_TO_DEVICE, DEVICE_TO_HOST, HOST_ATTENTION, HOST_MEMORY):
                yield self.spend[name], busy_s.get(name, 0.0)
            yield {}, busy_s[DEVICE_COMPUTE]
            chain = {name: each / self.size.batches for name, each in self.spend[HOST_ATTENTION].items()}
            together = busy_s[DEVICE_COMPUTE] + busy_s.get(HOST_ATTENTION, 0.0)
            yield chain, together / self.size.batches
            return
        copies: Terms = {}
        for name in (HOST_TO_DEVICE, DEVICE_TO_HOST, HOST_ATTENTION):
            for variable, seconds in self.spend[name].items():
                copies[variable] = copies.get(variable, 0.0) + seconds
        yield copies, sum(seconds for name, seconds in busy_s.items() if name != DISK_TO_HOST)

    def _realise(self, solution: Mapping[str, float]) -> Placement:
        given = self.given
        weights, cache = dict(given.draft.weights), given.draft.cache
        if not given.fixes_weights:
            for kind, tensors in self.kinds.items():
                counts = _whole({tier: solution[f"{kind} on {tier}"] for tier in TIERS})
                tiers = _interleaved(counts)
                weights |= {tensor.name: tier for tensor, tier in zip(tensors, tiers, strict=True)}
        if not given.fixes_cache:
            cache = tuple(_interleaved(_whole({tier: solution[f"cache on {tier}"] for tier in TIERS})))
        return replace(given.draft, weights=weights, cache=cache)


def _whole(counts: Mapping[Tier, float]) -> dict[Tier, int]:
    """Counts rounded so that their sum stays the same."""
    whole, sofar, given = {}, 0.0, 0
    for tier, count in counts.items():
        sofar += count
        whole[tier] = round(sofar) - given
        given += whole[tier]
    return whole


def _kinds(model: Model) -> dict[str, list[StoredTensor]]:
    """Tensors that differ only in their layer, by their name within it; table and head by their own."""
    manifest = model.manifest
    alone = [manifest.table] if manifest.holds_table else []
    kinds = {each.name: [each] for each in (*alone, *manifest.units[-1])}
    for index, unit in enumerate(manifest.units[:-1], manifest.first_layer):
        for tensor in unit:
            local = tensor.name.split(f".{index}.", 1)[1]
            kinds.setdefault(f"{local} {tensor.spec.shape} {tensor.codec.name}", []).append(tensor)
    return kinds


def _interleaved(counts: Mapping[Tier, int]) -> list[Tier]:
    """So many of each tier, evenly mixed."""
    places = [((index + 0.5) / count, tier) for tier, count in counts.items() for index in range(count)]
    return [tier for _, tier in sorted(places, key=lambda place: (place[0], TIERS.index(place[1])))]
