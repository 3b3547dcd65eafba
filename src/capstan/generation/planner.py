"""The planner: where things lie and how large the block is, so that a job takes the least time.

Outside, a search over the few whole numbers that change the program: slots in a GPU batch, batches in a
block, prompt tokens in a chunk, where attention over an offloaded cache runs. Inside, for each of them, the
integer program of placement_program.py. What is chosen is forecast sweep by sweep and written down.

Source: FlexGen, section 4.3, arXiv 2303.06865: it enumerates block sizes by powers of two too.
Differs: what is chosen is what runs, in whole tensors; rates are probed, not fitted by hand.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from capstan.errors import DoesNotFit
from capstan.generation.batching import BlockShape, Length, shape_for
from capstan.generation.forecast import (
    SweepSize,
    forecast,
    sweep_busy_s,
    sweep_traffic,
    wall_s,
)
from capstan.generation.memory import Demand, demand_of
from capstan.generation.model import Model
from capstan.generation.placement import TIERS, Placement, Tier, Wish, realised, spread
from capstan.generation.placement_program import Given, solve_placement
from capstan.hardware import Machine
from capstan.plans import Choice, Plan, bytes_text

Budgets = Mapping[Tier, int]
_CHUNK_TOKENS = {"cuda": 8192, "cpu": 1024}
_MOST_SLOTS = 512


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """A plan and the decisions behind it, as the engine runs them."""

    plan: Plan
    placement: Placement
    shape: BlockShape
    logit_rows: int


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans jobs of one model on one machine within budgets.

    `budgets` says what may be used of "device" and "host" memory and of the "disk" (0 for none).
    """

    model: Model
    machine: Machine
    budgets: Budgets
    wish: Wish = field(default_factory=Wish)

    @property
    def _on_cuda(self) -> bool:
        return self.machine.device("device").kind == "cuda"

    @property
    def _logit_rows(self) -> int:
        """So many rows of logits at once that they take about a sixteenth of the device."""
        row_bytes = 48 * self.model.skeleton.vocabulary_size
        return max(1, min(512, self.budgets["device"] // (16 * row_bytes)))

    def plan(
        self,
        lengths: Sequence[Length],
        *,
        weights: Mapping[str, Tier] | None = None,
        keeps_cache: bool = True,
    ) -> JobPlan:
        """The fastest plan for these sequences.

        Args:
            weights: where the weights already lie; None leaves it open.
            keeps_cache: False for scoring, which reads nothing back.

        Raises:
            DoesNotFit: not even one sequence at a time fits; says what is missing where.
        """
        best: tuple[float, Placement, BlockShape] | None = None
        too_large: set[int] = set()  # slots in a batch of which even fewer batches did not fit
        for shape in self._shapes(lengths):
            slots = shape.batches[0].slots
            if slots in too_large:
                continue
            chunked, placements = self._chunked(shape, lengths, weights, keeps_cache)
            if not placements:
                too_large.add(slots)
            for placement in placements:
                seconds = self._estimate_s(placement, chunked, lengths, keeps_cache)
                if best is None or seconds < best[0]:
                    best = (seconds, placement, chunked)
        if best is None:
            raise self._smallest_demand_error(lengths, weights, keeps_cache)
        _, placement, shape = best
        return JobPlan(
            plan=self._written(placement, shape, lengths, keeps_cache),
            placement=placement,
            shape=shape,
            logit_rows=self._logit_rows,
        )

    # --- the outer search --------------------------------------------------------------------------------

    def _shapes(self, lengths: Sequence[Length]) -> Iterator[BlockShape]:
        """Slots and batches by powers of two, up to what the job can use."""
        longest = max(length.prompt for length in lengths)
        usual = _CHUNK_TOKENS["cuda" if self._on_cuda else "cpu"]
        seen = set()
        for slots in _powers(min(len(lengths), _MOST_SLOTS)):
            for batches in _powers(-(-len(lengths) // slots)):
                shape = shape_for(lengths, slots=slots, batches=batches, chunk_tokens=max(usual, longest))
                if shape not in seen:
                    seen.add(shape)
                    yield shape

    def _chunked(
        self,
        shape: BlockShape,
        lengths: Sequence[Length],
        weights: Mapping[str, Tier] | None,
        keeps_cache: bool,
    ) -> tuple[BlockShape, list[Placement]]:
        """The block with as large a chunk of prompts as fits, and its placements."""
        longest = max(length.prompt for length in lengths)
        chunk_tokens = shape.chunk_tokens
        while True:
            placements = list(self._placements(shape, lengths, weights, keeps_cache))
            if placements or chunk_tokens == longest:
                return shape, placements
            chunk_tokens = max(longest, chunk_tokens // 4)
            shape = replace(shape, chunk_tokens=chunk_tokens)

    def _placements(
        self,
        shape: BlockShape,
        lengths: Sequence[Length],
        weights: Mapping[str, Tier] | None,
        keeps_cache: bool,
    ) -> Iterator[Placement]:
        """Placements for a block that fit the budgets: the integer program's, for each way to attend."""
        wished = self.wish.attention
        ways = (wished == "host",) if wished else (False, True)
        for host_attention in ways if keeps_cache else (False,):
            for activations in (self.wish.activations,) if self.wish.activations else ("device", "host"):
                placement = self._placed(shape, lengths, weights, keeps_cache, host_attention, activations)
                if placement is not None:
                    yield placement
                    break

    def _placed(
        self,
        shape: BlockShape,
        lengths: Sequence[Length],
        weights: Mapping[str, Tier] | None,
        keeps_cache: bool,
        host_attention: bool,
        activations: Tier,
    ) -> Placement | None:
        near: Tier = "device"
        draft = Placement(
            weights=weights or self._wished_weights() or dict.fromkeys(self.model.inventory.placeable, near),
            cache=self._wished_cache() or (near,) * self.model.num_layers,
            activations=activations,
            host_attention=host_attention,
        )
        given = Given(
            model=self.model,
            machine=self.machine,
            budgets=self.budgets,
            shape=shape,
            draft=draft,
            fixes_weights=weights is not None or self.wish.weights is not None,
            fixes_cache=not keeps_cache or self.wish.cache is not None,
            demand_of=lambda placement: self._demand(placement, shape, lengths, keeps_cache),
        )
        if not (given.fixes_weights and given.fixes_cache):
            try:
                draft = solve_placement(given)
            except DoesNotFit:
                return None
        if draft.host_attention and all(tier == "device" for tier in draft.cache):
            draft = replace(draft, host_attention=self.wish.attention == "host")
        fits = self._fits(self._demand(draft, shape, lengths, keeps_cache))
        return draft if fits else None

    def _wished_weights(self) -> dict[str, Tier] | None:
        if self.wish.weights is None:
            return None
        tensors = list(self.model.inventory.placeable.values())
        tiers = spread([each.stored_bytes for each in tensors], self.wish.weights)
        return {each.name: tier for each, tier in zip(tensors, tiers, strict=True)}

    def _wished_cache(self) -> tuple[Tier, ...] | None:
        if self.wish.cache is None:
            return None
        return tuple(spread([layout.row_bytes for layout in self.model.formats], self.wish.cache))

    def _demand(
        self, placement: Placement, shape: BlockShape, lengths: Sequence[Length], keeps_cache: bool
    ) -> Demand:
        return demand_of(
            self.model,
            placement,
            shape,
            lengths,
            logit_rows=self._logit_rows,
            on_cuda=self._on_cuda,
            keeps_cache=keeps_cache,
        )

    def _fits(self, demand: Demand) -> bool:
        return all(demand.on(tier) <= self.budgets[tier] for tier in TIERS)

    def _estimate_s(
        self, placement: Placement, shape: BlockShape, lengths: Sequence[Length], keeps_cache: bool
    ) -> float:
        """A quick estimate of the job's seconds: full blocks of average sequences."""
        slots = shape.num_slots
        mean_prompt = sum(length.prompt for length in lengths) / len(lengths)
        mean_new = sum(length.new for length in lengths) / len(lengths)
        rounds = len(lengths) / slots

        def sweep_s(size: SweepSize) -> float:
            traffic = sweep_traffic(self.model, placement, size, keeps_cache=keeps_cache)
            return wall_s(sweep_busy_s(self.model, placement, size, traffic, self.machine), self.machine)

        tokens = int(slots * mean_prompt)
        chunks = max(len(shape.batches), -(-tokens // shape.chunk_tokens))
        prefill = SweepSize(tokens=tokens, chunks=chunks, prompt_square=int(slots * mean_prompt**2))
        context = int(slots * (mean_prompt + mean_new / 2))
        decode = SweepSize(tokens=slots, decoding=slots, rows_read=context, chunks=len(shape.batches))
        # Sequences of one block end together only if they are equally long; a sweep more covers the rest.
        decode_sweeps = max(rounds * (mean_new - 1), max(length.new for length in lengths) - 1)
        return max(rounds, 1) * sweep_s(prefill) + decode_sweeps * sweep_s(decode)

    # --- words -------------------------------------------------------------------------------------------

    def _smallest_demand_error(
        self, lengths: Sequence[Length], weights: Mapping[str, Tier] | None, keeps_cache: bool
    ) -> DoesNotFit:
        """Say what the smallest block lacks where, with everything as far away as it may be."""
        longest = max(lengths, key=lambda length: length.cached)
        prompt = max(length.prompt for length in lengths)
        shape = shape_for([longest], slots=1, batches=1, chunk_tokens=prompt)
        away: Tier = "disk" if self.budgets["disk"] else "host"
        furthest: dict[str, Tier] = {
            name: "disk" if tensor.is_as_in_checkpoint else away
            for name, tensor in self.model.inventory.placeable.items()
        }
        placement = Placement(
            weights=weights or self._wished_weights() or furthest,
            cache=self._wished_cache() or (away,) * self.model.num_layers,
            activations=self.wish.activations or "device",
            host_attention=self.wish.attention != "device",
        )
        demand = self._demand(placement, shape, [longest], keeps_cache)
        try:
            demand.require(self.budgets)
        except DoesNotFit as error:
            return error
        return DoesNotFit(
            f"No placement of {self.model.folder} was found within "
            + ", ".join(f"{tier} {bytes_text(self.budgets[tier])}" for tier in TIERS)
            + ". Grant more memory, or name a folder with --disk."
        )

    def _written(
        self, placement: Placement, shape: BlockShape, lengths: Sequence[Length], keeps_cache: bool
    ) -> Plan:
        model, demand = self.model, self._demand(placement, shape, lengths, keeps_cache)
        phases = forecast(model, placement, shape, lengths, self.machine, keeps_cache=keeps_cache)
        bits = model.inventory.stored_bytes * 8 / max(1, model.num_parameters)
        return Plan(
            system="generation",
            title=f"{model.folder.name}, {model.num_parameters / 1e6:,.1f} M parameters at {bits:.1f} bits, "
            f"{len(lengths):,} sequences",
            machine=self.machine.name,
            choices=_choices(model, placement, shape, phases, keeps_cache),
            phases=phases,
            peak_bytes={tier: demand.on(tier) for tier in TIERS if demand.on(tier)},
            budget_bytes={tier: size for tier, size in self.budgets.items() if size},
        )


def _choices(
    model: Model, placement: Placement, shape: BlockShape, phases: Sequence[object], keeps_cache: bool
) -> tuple[Choice, ...]:
    tensors = list(model.inventory.placeable.values())
    where = [placement.weights[each.name] for each in tensors]
    sizes = [each.stored_bytes for each in tensors]
    first = shape.batches[0]
    choices = [
        Choice(
            name="block",
            value=f"{len(shape.batches)} x {first.slots} sequences of up to {first.capacity} tokens",
            reason="weights cross once for the whole block",
        ),
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
        side = "host" if placement.host_attention else "device"
        choices.append(
            Choice(name="attention", value=side, reason="where an offloaded cache is attended, or crosses to")
        )
    choices.append(Choice(name="activations", value=placement.activations))
    return tuple(choices)


def _powers(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself."""
    powers = [1]
    while powers[-1] * 2 < most:
        powers.append(powers[-1] * 2)
    return powers if most <= 1 else [*powers, most]
