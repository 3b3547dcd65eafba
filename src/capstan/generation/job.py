"""One job: sequences go through the block, sweep by sweep, until all are answered."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from capstan.errors import DoesNotFit
from capstan.generation.activations import Activations
from capstan.generation.batching import BatchWork, Block, BlockShape, Length, Work
from capstan.generation.block_schedule import BlockSchedule, Pick
from capstan.generation.forecast import DECODE, PREFILL
from capstan.generation.kv_cache import KeyValueCache, Lanes
from capstan.generation.memory import demand_of, extent_of
from capstan.generation.model import Model
from capstan.generation.planner import JobPlan
from capstan.generation.sampling import choose, logprobs_of
from capstan.generation.sequences import Sequence as Growing
from capstan.generation.weights import WeightStore
from capstan.plans import Phase, Traffic
from capstan.storage import DiskSlab, SlabKeeper
from capstan.storage.live_bytes import LiveBytes
from capstan.transport import Lane, Ledger, Stopwatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is; handed to the caller after every sweep."""

    num_sequences: int
    num_finished: int
    num_generated: int
    num_sweeps: int
    num_running: int
    seconds: float


OnProgress = Callable[[Progress], None]


@dataclass
class Measured:
    """What a job's sweeps were seen to take, phase by phase."""

    phases: dict[str, Phase] = field(default_factory=dict)
    workspace_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, phase: Phase) -> None:
        """Add a sweep to its phase."""
        known = self.phases.get(phase.name)
        if known is not None:
            busy_s = {
                name: known.busy_s.get(name, 0.0) + phase.busy_s.get(name, 0.0)
                for name in {*known.busy_s, *phase.busy_s}
            }
            phase = Phase(
                name=phase.name,
                seconds=known.seconds + phase.seconds,
                busy_s=busy_s,
                traffic=known.traffic + phase.traffic,
                num_tokens=known.num_tokens + phase.num_tokens,
            )
        self.phases[phase.name] = phase


class Job:
    """Runs sequences through one plan. `run()` yields each sequence when it is over."""

    def __init__(
        self,
        model: Model,
        weights: WeightStore,
        plan: JobPlan,
        sequences: Sequence[Growing],
        *,
        device: torch.device,
        disk_folder: Path | None,
        ledger: Ledger,
        keeper: SlabKeeper,
        on_progress: OnProgress | None = None,
        keeps_cache: bool = True,
    ) -> None:
        self._model, self._weights, self._plan = model, weights, plan
        self._sequences = list(sequences)
        self._device, self._disk_folder, self._ledger = device, disk_folder, ledger
        self._keeper, self._on_progress, self._keeps_cache = keeper, on_progress, keeps_cache
        self._num_generated = self._num_sweeps = 0
        self._largest_sweep = (0, 0)
        self._delivered: set[int] = set()
        self.measured = Measured()
        self.device_bytes = self.host_bytes = 0  # of the cache and the activations, at most

    def run(self) -> Iterator[Growing]:
        """Yield sequences as they end. When memory runs out, go on with half as many at a time."""
        shape: BlockShape | None = self._plan.shape
        self._start_s = time.perf_counter()
        while shape is not None:
            try:
                yield from self._run_block(shape)
                return
            except (torch.OutOfMemoryError, _NoRoom) as error:
                smaller = shape.halved()
                if smaller is None:
                    if error.__cause__ is not None:
                        raise error.__cause__ from None
                    raise DoesNotFit(
                        f"{self._device} ran out of memory with a single sequence: {error}. "
                        "Lower --device-memory, or end what else runs there."
                    ) from error
                note = f"out of memory with {shape.num_slots} slots; went on with {smaller.num_slots}"
                logger.warning(note)
                self.measured.notes.append(note)
                shape = smaller
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _run_block(self, shape: BlockShape) -> Iterator[Growing]:
        yield from self._deliver(self._sequences)  # what ended in a sweep that was cut short
        waiting = [sequence for sequence in self._sequences if sequence.finish_reason is None]
        if not waiting:
            return
        for sequence in waiting:
            if len(sequence.prompt_logprobs) < len(sequence.prompt) - 1:
                sequence.prompt_logprobs.clear()  # half of them, of a sweep that was cut short
        lengths = [sequence.length for sequence in waiting]
        block = Block(shape, lengths)
        with _Resources(self, shape, lengths) as resources:
            while works := block.sweep():
                ended = self._sweep(resources, works, waiting, block)
                block.finish(ended)
                block.advance()
                yield from self._deliver([waiting[index] for index in ended])

    def _deliver(self, sequences: Sequence[Growing]) -> Iterator[Growing]:
        """Yield those that are over, each once."""
        for sequence in sequences:
            if sequence.finish_reason is not None and id(sequence) not in self._delivered:
                self._delivered.add(id(sequence))
                yield sequence

    def _sweep(
        self, resources: "_Resources", works: list[BatchWork], waiting: list[Growing], block: Block
    ) -> list[int]:
        """Compute a sweep; returns which sequences are over."""
        ended: list[int] = []
        before, start_s = (self._ledger.traffic, self._ledger.busy_s), time.perf_counter()
        generated_before = self._num_generated

        def on_logits(picks: Sequence[Pick], logits: Tensor) -> None:
            ended.extend(self._take_logits(picks, logits.float(), waiting))

        with self._watching(works) as live:
            resources.schedule.sweep(
                works,
                tokens_of=lambda work: [
                    waiting[work.sequence].token(at) for at in range(work.start, work.end)
                ],
                positions_of=lambda work: self._positions(work, waiting[work.sequence]),
                on_logits=on_logits,
                is_last=not block.goes_on,
            )
            resources.settle()
        if live is not None:
            self.measured.workspace_bytes = max(self.measured.workspace_bytes, live.peak_bytes)
        self._num_sweeps += 1
        self._measure(works, before, time.perf_counter() - start_s, self._num_generated - generated_before)
        if self._on_progress is not None:
            self._on_progress(self._progress(block.num_running - len(ended)))
        return ended

    def _positions(self, work: Work, sequence: Growing) -> range:
        """Where logits are wanted: at the last token, or at every one of a prompt that is to be scored."""
        if work.is_prefix:
            return range(0)
        if not self._keeps_cache or (sequence.request.prompt_logprobs is not None and work.start == 0):
            first = 0 if not sequence.prompt_logprobs else work.end - 1
            return range(first, work.end)
        return range(work.end - 1, work.end)

    def _take_logits(self, picks: Sequence[Pick], logits: Tensor, waiting: list[Growing]) -> list[int]:
        """Turn logits into log-probabilities of the prompt, and into next tokens."""
        is_inside = [pick.position < len(waiting[pick.sequence].prompt) - 1 for pick in picks]
        inside = [row for row, within in enumerate(is_inside) if within]
        if inside:
            self._score(
                logits[inside] if len(inside) < len(picks) else logits,
                [picks[row] for row in inside],
                waiting,
            )
        if not self._keeps_cache:
            ended = [
                pick.sequence for pick in picks if pick.position == len(waiting[pick.sequence].prompt) - 1
            ]
            for index in ended:
                waiting[index].finish_reason = "length"
            return ended
        last = [row for row, within in enumerate(is_inside) if not within]
        if not last:
            return []
        return self._extend(logits[last] if inside else logits, [picks[row] for row in last], waiting)

    def _score(self, logits: Tensor, picks: Sequence[Pick], waiting: list[Growing]) -> None:
        following = [waiting[pick.sequence].prompt[pick.position + 1] for pick in picks]
        counts = [waiting[pick.sequence].request.prompt_logprobs or 0 for pick in picks]
        for pick, scored in zip(picks, logprobs_of(logits, following, counts), strict=True):
            waiting[pick.sequence].prompt_logprobs.append(scored)

    def _extend(self, logits: Tensor, picks: Sequence[Pick], waiting: list[Growing]) -> list[int]:
        sequences = [waiting[pick.sequence] for pick in picks]
        tokens = choose(logits, [sequence.draw for sequence in sequences]).tolist()
        wanting = [row for row, sequence in enumerate(sequences) if sequence.request.logprobs is not None]
        if wanting:
            counts = [sequences[row].request.logprobs or 0 for row in wanting]
            scored = logprobs_of(logits[wanting], [tokens[row] for row in wanting], counts)
            for row, entry in zip(wanting, scored, strict=True):
                sequences[row].logprobs.append(entry)
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
        self._num_generated += len(tokens)
        return [pick.sequence for pick, each in zip(picks, sequences, strict=True) if each.finish_reason]

    def note_memory(self, *, device: int, host: int) -> None:
        """A block has taken so much memory apart from weights and workspace."""
        self.device_bytes, self.host_bytes = max(self.device_bytes, device), max(self.host_bytes, host)

    # --- measuring ---------------------------------------------------------------------------------------

    def _watching(self, works: list[BatchWork]) -> AbstractContextManager[LiveBytes | None]:
        """Follow temporary memory in the sweeps that can need more than any before; it slows them a little.
        A GPU's allocator keeps its own account."""
        tokens = sum(chunk.num_tokens for work in works for chunk in work.chunks)
        rows = max(each.end for work in works for chunk in work.chunks for each in chunk.works)
        grown = tokens > self._largest_sweep[0] or rows >= 1.25 * self._largest_sweep[1]
        if self._device.type == "cuda" or not grown:
            return nullcontext()
        self._largest_sweep = (max(tokens, self._largest_sweep[0]), max(rows, self._largest_sweep[1]))
        return LiveBytes()

    def _measure(
        self, works: list[BatchWork], before: tuple[Traffic, dict[str, float]], seconds: float, num_new: int
    ) -> None:
        traffic, busy_s = self._ledger.traffic, self._ledger.busy_s
        has_prompts = any(chunk.is_prefill for work in works for chunk in work.chunks)
        self.measured.add(
            Phase(
                name=PREFILL if has_prompts else DECODE,
                seconds=seconds,
                busy_s={name: spent - before[1].get(name, 0.0) for name, spent in busy_s.items()},
                traffic=traffic - before[0],
                num_tokens=num_new,
            )
        )

    def _progress(self, num_running: int) -> Progress:
        return Progress(
            num_sequences=len(self._sequences),
            num_finished=len([each for each in self._sequences if each.finish_reason is not None]),
            num_generated=self._num_generated,
            num_sweeps=self._num_sweeps,
            num_running=num_running,
            seconds=time.perf_counter() - self._start_s,
        )


class _NoRoom(Exception):
    """A block's memory could not be had; its cause says what and where."""


class _Resources:
    """The memory, lanes and schedule of one block; closed in the reverse order."""

    def __init__(self, job: Job, shape: BlockShape, lengths: Sequence[Length]) -> None:
        self._job, self._shape, self._lengths = job, shape, lengths
        self._stack = ExitStack()

    def __enter__(self) -> "_Resources":
        try:
            self._open()
        except DoesNotFit as error:
            self._stack.close()
            raise _NoRoom from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def _open(self) -> None:
        job, model, placement = self._job, self._job._model, self._job._plan.placement
        device, ledger = job._device, job._ledger
        demand = demand_of(
            model,
            placement,
            self._shape,
            self._lengths,
            logit_rows=job._plan.logit_rows,
            on_cuda=device.type == "cuda",
            keeps_cache=job._keeps_cache,
        )
        extent = extent_of(self._shape, self._lengths)
        scratch_bytes = sum(demand.parts["disk"][name] for name in ("KV cache", "hidden states"))
        disk = None
        if scratch_bytes:
            assert job._disk_folder is not None, "the planner uses no disk that was not granted"
            disk = self._stack.enter_context(DiskSlab(job._disk_folder, scratch_bytes))
        names = ("cache in", "cache out", "host attention", "results in", "activations in", "activations out")
        self._lanes = [
            self._stack.enter_context(
                Lane(name, device=device, ledger=ledger, is_urgent=name == "results in")
            )
            for name in names
        ]
        *cache_lanes, hidden_in, hidden_out = self._lanes
        cache = None
        if job._keeps_cache:
            cache = KeyValueCache(
                model.formats,
                placement,
                self._shape,
                tokens=extent.chunk_tokens,
                device=device,
                disk=disk,
                lanes=Lanes(*cache_lanes),
                ledger=ledger,
                keeper=job._keeper,
            )
            self._stack.callback(cache.close)
        activations = Activations(
            placement.activations,
            width=model.skeleton.hidden_size,
            dtype=model.skeleton.compute_dtype,
            sweep_tokens=extent.sweep_tokens,
            batch_tokens=extent.batch_tokens,
            device=device,
            disk=disk,
            lane_in=hidden_in,
            lane_out=hidden_out,
        )
        self._stack.callback(activations.close)
        job.note_memory(
            device=activations.device_bytes + (cache.device_bytes if cache else 0),
            host=activations.host_bytes + (cache.host_bytes if cache else 0),
        )
        self._stopwatch = Stopwatch(ledger, device)
        self.schedule = BlockSchedule(
            model.skeleton,
            model.anatomy,
            job._weights,
            activations,
            cache=cache,
            logit_rows=job._plan.logit_rows,
            device=device,
            ledger=ledger,
            stopwatch=self._stopwatch,
        )

    def settle(self) -> None:
        """Wait for what is on its way, and book its time."""
        for lane in self._lanes:
            lane.drain()
            lane.stopwatch.settle()
        self._job._weights.settle()
        self._stopwatch.settle()

    def __exit__(self, *_: object) -> None:
        try:
            self._job._weights.forget()
        finally:
            for lane in self._lanes:
                lane.close()
            self._stack.close()
