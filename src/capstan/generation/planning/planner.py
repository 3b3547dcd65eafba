"""The planner: where things lie and how large the block is, so that a job takes the least time.

Outside, a search over the few whole numbers that change the program: how many rounds the job takes, batches
in a block, prompt tokens in a chunk, which share of an offloaded cache is attended on the host. Inside, for
each of them, the program of placement_program.py: relaxed, to compare; then, for the best few, in whole
tensors and layers. What is chosen is forecast sweep by sweep and written down.

Source: FlexGen, section 4.3, arXiv 2303.06865: it enumerates block sizes too.
Differs: what is chosen is what runs, in whole tensors; rates are probed, not fitted by hand; the cache is
divided between the link and the host's processors, where the paper chooses one of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from capstan.errors import DoesNotFit
from capstan.generation.model import Model
from capstan.generation.planning.batching import BlockShape, Length, shape_for
from capstan.generation.planning.forecast import (
    Rates,
    SweepSize,
    forecast,
    sweep_busy_s,
    sweep_traffic,
    wall_s,
)
from capstan.generation.planning.job_plan import Candidate, JobPlan, Task
from capstan.generation.planning.memory import Demand, demand_of
from capstan.generation.planning.placement import TIERS, Placement, Tier, Wish, spread
from capstan.generation.planning.placement_program import Given, solve_placement
from capstan.generation.planning.plan_words import choices_of
from capstan.generation.planning.prefixes import fitting, price_s, weighed
from capstan.generation.planning.resources import HOST_ATTENTION, HOST_TO_DEVICE
from capstan.hardware import Machine
from capstan.plans import Phase, Plan, bytes_text

Budgets = Mapping[Tier, int]
_CHUNK_TOKENS = {"cuda": 2048, "cpu": 1024}
_MOST_SLOTS = 512
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # batches and rounds that are tried
_MOST_BATCHES = 32

# Blocks whose placements are solved exactly after all were compared roughly.
FINALISTS = 4


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans jobs of one model on one machine within budgets.

    `budgets` says what may be used of "device" and "host" memory and of the "disk" (0 for none);
    `host_attention_bytes_per_s` how fast the host attends this model's rows, by default four fifths of the
    rate at which it reads memory. `shares_prefixes` says whether what all prompts begin with is computed and
    stored once: always, never, or (None) where that is predicted to be faster.
    """

    model: Model
    machine: Machine
    budgets: Budgets
    wish: Wish = field(default_factory=Wish)
    shares_prefixes: bool | None = None
    host_attention_bytes_per_s: float | None = None

    @property
    def rates(self) -> Rates:
        bandwidth = self.machine.device("host").memory_bandwidth_bytes_per_s
        return Rates(self.machine, self.host_attention_bytes_per_s or 0.8 * bandwidth)

    @property
    def _on_cuda(self) -> bool:
        return self.machine.device("device").kind == "cuda"

    @property
    def _logit_rows(self) -> int:
        """So many rows of logits at once that they take about a sixteenth of the device."""
        row_bytes = 48 * self.model.meta_model.vocabulary_size
        return max(1, min(512, self.budgets["device"] // (16 * row_bytes)))

    def plan(
        self,
        lengths: Sequence[Length],
        *,
        opened: Placement | None = None,
        keeps_cache: bool = True,
        prefix: int = 0,
    ) -> JobPlan:
        """The fastest plan for these sequences.

        Args:
            opened: the placement with which the weights were brought to where they lie; None leaves it open.
            keeps_cache: False for scoring, which reads nothing back.
            prefix: so many tokens are the same at the beginning of all prompts, fewer than any prompt has;
                they are shared as `shares_prefixes` says.

        Raises:
            DoesNotFit: not even one sequence at a time fits; says what is missing where.
        """
        job = Task(lengths=lengths, opened=opened, keeps_cache=keeps_cache, prefix=prefix)
        if not prefix or self.shares_prefixes is not None:
            return self._planned(job)
        ways = [partial(self._planned, job), partial(self._planned, replace(job, prefix=0))]
        if self._on_cuda and self.wish.cache is None:
            near = replace(self, wish=replace(self.wish, cache={"device": 1.0}))
            ways.insert(1, partial(near._planned, job))
        plans = fitting(ways)
        return weighed(plans, [self._job_s(each) for each in plans], prefix)

    def _job_s(self, planned: JobPlan) -> float:
        return price_s(planned) if self._on_cuda else planned.plan.seconds

    def _planned(self, job: Task) -> JobPlan:
        best: Candidate | None = None
        roughly = sorted(self._rough_candidates(job), key=lambda candidate: candidate.seconds)
        for rank, rough in enumerate(roughly):
            if rank >= FINALISTS and best is not None:
                break
            for exact in self._exact_candidates(job, rough):
                if best is None or exact.seconds < best.seconds:
                    best = exact
        if best is None:
            raise self._smallest_demand_error(job)
        return self._job_plan(best, job)

    def _job_plan(self, best: Candidate, job: Task) -> JobPlan:
        return JobPlan(
            plan=self._written(best.placement, best.shape, job),
            lengths=tuple(job.lengths),
            prefix=job.prefix,
            common=job.prefix,
            placement=best.placement,
            shape=best.shape,
            logit_rows=self._logit_rows,
        )

    # --- the outer search --------------------------------------------------------------------------------

    def _shapes(self, job: Task) -> Iterator[BlockShape]:
        """Blocks that answer the job in a number of equal rounds, in a number of batches."""
        lengths, longest = job.lengths, self._longest(job)
        chunk_tokens = max(longest, _CHUNK_TOKENS["cuda" if self._on_cuda else "cpu"])
        seen = set()
        for slots in {-(-len(lengths) // rounds) for rounds in (*_STEPS, *_powers(len(lengths)))}:
            for batches in (each for each in _STEPS if each <= min(slots, _MOST_BATCHES)):
                size = -(-slots // batches)
                if size <= _MOST_SLOTS:
                    shape = shape_for(
                        lengths, slots=size, batches=batches, chunk_tokens=chunk_tokens, prefix=job.prefix
                    )
                    if shape not in seen:
                        seen.add(shape)
                        yield shape

    def _longest(self, job: Task) -> int:
        """Tokens that pass through a layer together at least: prompts are not divided."""
        return max(job.prefix, max(length.prompt for length in job.lengths) - job.prefix)

    def _rough_candidates(self, job: Task) -> Iterator[Candidate]:
        for shape in self._shapes(job):
            yield from self._rough_candidates_of(job, shape)

    def _rough_candidates_of(self, job: Task, shape: BlockShape) -> list[Candidate]:
        """A block, if it fits, with the largest chunk of prompts with which it does."""
        longest = self._longest(job)
        while not (found := list(self._shares(job, shape))) and shape.chunk_tokens > longest:
            shape = replace(shape, chunk_tokens=max(longest, shape.chunk_tokens // 4))
        return found

    def _shares(self, job: Task, shape: BlockShape) -> Iterator[Candidate]:
        """Placements of a block: the offloaded cache attended on the host, and, if that takes longer than
        the link is busy anyway, divided so that the two take equally long."""
        if not job.keeps_cache or self.wish.attention is not None:
            yield from self._solved(job, shape, self.wish.attention or 0.0, relaxed=True)
            return
        hosted = list(self._solved(job, shape, 1.0, relaxed=True))
        yield from hosted
        shares = {self._balanced_share(job, candidate) for candidate in hosted} or {0.0}
        if not self._on_cuda:  # copies and attention take turns on one processor: all or nothing
            shares = {0.0}
        for share in shares - {1.0}:
            yield from self._solved(job, shape, share, relaxed=True)

    def _balanced_share(self, job: Task, candidate: Candidate) -> float:
        """The share of the batches to be attended on the host for which it takes as long as the link, in a
        decode sweep (FlexGen note, section 4: 1 - x*); a multiple of a batch."""
        num_batches = len(candidate.shape.batches)
        near = replace(candidate.placement, host_attention=0.0)
        size = self._decode_size(job, candidate.shape, candidate.placement)
        hosted = self._busy_s(candidate.placement, size)
        crossing = self._busy_s(near, self._decode_size(job, candidate.shape, near))
        attended_s = hosted.get(HOST_ATTENTION, 0.0)
        weights_s, all_s = hosted.get(HOST_TO_DEVICE, 0.0), crossing.get(HOST_TO_DEVICE, 0.0)
        if attended_s <= weights_s:
            return 1.0
        # (1 - x) attended = weights + x (all - weights)
        share = 1 - (attended_s - weights_s) / (attended_s + all_s - weights_s)
        return round(share * num_batches) / num_batches

    def _exact_candidates(self, job: Task, rough: Candidate) -> Iterator[Candidate]:
        for ring_slots in (2,) if job.opened is not None else (2, 3):
            yield from self._solved(
                job, rough.shape, rough.placement.host_attention, relaxed=False, ring_slots=ring_slots
            )

    def _solved(
        self, job: Task, shape: BlockShape, share: float, *, relaxed: bool, ring_slots: int = 2
    ) -> Iterator[Candidate]:
        """The program's placement for a block, with hidden states on the device or else on the host."""
        for activations in (self.wish.activations,) if self.wish.activations else TIERS[:2]:
            placement = self._placed(job, shape, share, activations, relaxed=relaxed, ring_slots=ring_slots)
            if placement is not None:
                yield Candidate(self._estimate_s(job, shape, placement), shape, placement)
                return

    def _placed(
        self,
        job: Task,
        shape: BlockShape,
        share: float,
        activations: Tier,
        *,
        relaxed: bool,
        ring_slots: int,
    ) -> Placement | None:
        near: Tier = "device"
        opened = job.opened
        draft = Placement(
            weights=opened.weights
            if opened
            else self._wished_weights() or dict.fromkeys(self.model.manifest.placeable, near),
            cache=self._wished_cache() or (near,) * self.model.num_layers,
            activations=activations,
            host_attention=share,
            ring_slots=opened.ring_slots if opened else ring_slots,
        )
        given = Given(
            model=self.model,
            rates=self.rates,
            budgets=self.budgets,
            shape=shape,
            draft=draft,
            fixes_weights=opened is not None or self.wish.weights is not None,
            fixes_cache=not job.keeps_cache or self.wish.cache is not None,
            demand_of=lambda placement: self._demand(placement, shape, job),
            relaxed=relaxed,
        )
        if not (given.fixes_weights and given.fixes_cache):
            try:
                draft = solve_placement(given)
            except DoesNotFit:
                return None
            if relaxed:  # rounding may miss the budgets by a little; exact solutions do not
                return draft
        if draft.host_attention and all(tier == "device" for tier in draft.cache):
            draft = replace(draft, host_attention=self.wish.attention or 0.0)
        return draft if self._fits(self._demand(draft, shape, job)) else None

    def _wished_weights(self) -> dict[str, Tier] | None:
        if self.wish.weights is None:
            return None
        tensors = list(self.model.manifest.placeable.values())
        tiers = spread([each.stored_bytes for each in tensors], self.wish.weights)
        return {each.name: tier for each, tier in zip(tensors, tiers, strict=True)}

    def _wished_cache(self) -> tuple[Tier, ...] | None:
        if self.wish.cache is None:
            return None
        return tuple(spread([layout.row_bytes for layout in self.model.formats], self.wish.cache))

    def _demand(self, placement: Placement, shape: BlockShape, job: Task) -> Demand:
        return demand_of(
            self.model,
            placement,
            shape,
            job.lengths,
            logit_rows=self._logit_rows,
            on_cuda=self._on_cuda,
            keeps_cache=job.keeps_cache,
        )

    def _fits(self, demand: Demand) -> bool:
        return all(demand.on(tier) <= self.budgets[tier] for tier in TIERS)

    # --- estimates ---------------------------------------------------------------------------------------

    def _decode_size(self, job: Task, shape: BlockShape, placement: Placement) -> SweepSize:
        """A full block half-way through its answers."""
        slots, num_batches = shape.num_slots, len(shape.batches)
        share = len(placement.host_batches(num_batches)) / num_batches
        mean = sum(length.prompt + length.new / 2 for length in job.lengths) / len(job.lengths)
        rows = int(slots * (mean - job.prefix))
        return SweepSize(
            batches=num_batches,
            tokens=slots,
            decoding=slots,
            rows_read=rows,
            decoding_on_host=int(share * slots),
            rows_read_on_host=int(share * rows),
            prefix_rows=job.prefix,
            chunks=num_batches,
            waves=shape.waves,
        )

    def _busy_s(self, placement: Placement, size: SweepSize, *, keeps_cache: bool = True) -> dict[str, float]:
        traffic = sweep_traffic(self.model, placement, size, keeps_cache=keeps_cache)
        return sweep_busy_s(self.model, placement, size, traffic, self.rates)

    def _estimate_s(self, job: Task, shape: BlockShape, placement: Placement) -> float:
        """A quick estimate of the job's seconds: full blocks of average sequences."""
        slots, lengths = shape.num_slots, job.lengths
        mean_prompt = sum(length.prompt for length in lengths) / len(lengths) - job.prefix
        mean_new = sum(length.new for length in lengths) / len(lengths)
        rounds = len(lengths) / slots

        def sweep_s(size: SweepSize) -> float:
            busy_s = self._busy_s(placement, size, keeps_cache=job.keeps_cache)
            return wall_s(busy_s, self.model, placement, size, self.machine)

        tokens = int(slots * mean_prompt)
        chunks = max(len(shape.batches), -(-tokens // shape.chunk_tokens))
        prefill = SweepSize(
            batches=len(shape.batches),
            tokens=tokens,
            chunks=chunks,
            prompt_chunks=chunks,
            prefix_rows=job.prefix,
            prompt_square=int(slots * mean_prompt * (mean_prompt + 2 * job.prefix)),
            waves=shape.waves,
        )
        # Sequences of one block end together only if they are equally long; a sweep more covers the rest.
        decode_sweeps = max(rounds * (mean_new - 1), max(length.new for length in lengths) - 1)
        decode_s = sweep_s(self._decode_size(job, shape, placement))
        return max(rounds, 1) * sweep_s(prefill) + decode_sweeps * decode_s

    # --- words -------------------------------------------------------------------------------------------

    def _smallest_demand_error(self, job: Task) -> DoesNotFit:
        """Say what the smallest block lacks where, with everything as far away as it may be."""
        longest = max(job.lengths, key=lambda length: length.cached)
        prompt = max(length.prompt for length in job.lengths)
        shape = shape_for([longest], slots=1, batches=1, chunk_tokens=prompt)
        away: Tier = "disk" if self.budgets["disk"] else "host"
        furthest: dict[str, Tier] = {
            name: "disk" if tensor.is_as_in_checkpoint else away
            for name, tensor in self.model.manifest.placeable.items()
        }
        placement = Placement(
            weights=job.opened.weights if job.opened else self._wished_weights() or furthest,
            cache=self._wished_cache() or (away,) * self.model.num_layers,
            activations=self.wish.activations or "device",
            host_attention=1.0 if self.wish.attention is None else self.wish.attention,
        )
        demand = self._demand(placement, shape, replace(job, lengths=[longest]))
        try:
            demand.require(self.budgets)
        except DoesNotFit as error:
            return error
        return DoesNotFit(
            f"No placement of {self.model.folder} was found within "
            + ", ".join(f"{tier} {bytes_text(self.budgets[tier])}" for tier in TIERS)
            + ". Grant more memory, or name a folder with --disk."
        )

    def _written(self, placement: Placement, shape: BlockShape, job: Task) -> Plan:
        model, lengths, demand = self.model, job.lengths, self._demand(placement, shape, job)
        bits = model.manifest.stored_bytes * 8 / max(1, model.num_parameters)
        return Plan(
            system="generation",
            title=f"{model.folder.name}, {model.num_parameters / 1e6:,.1f} M parameters at {bits:.1f} bits, "
            f"{len(lengths):,} sequences",
            machine=self.machine.name,
            choices=choices_of(model, placement, shape, keeps_cache=job.keeps_cache),
            phases=self._phases(placement, shape, job),
            peak_bytes={tier: demand.on(tier) for tier in TIERS if demand.on(tier)},
            budget_bytes={tier: size for tier, size in self.budgets.items() if size},
        )

    def _phases(self, placement: Placement, shape: BlockShape, job: Task) -> tuple[Phase, ...]:
        return forecast(self.model, placement, shape, job.lengths, self.rates, keeps_cache=job.keeps_cache)


def _powers(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself."""
    powers = [1]
    while powers[-1] * 2 < most:
        powers.append(powers[-1] * 2)
    return powers if most <= 1 else [*powers, most]
