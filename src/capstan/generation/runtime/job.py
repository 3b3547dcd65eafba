"""One job: sequences go through the block, sweep by sweep, until all are answered."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from capstan.errors import DoesNotFit
from capstan.generation.model import Model
from capstan.generation.planning.activation_buffers import outbox_bytes
from capstan.generation.planning.batching import BatchWork, Block, BlockShape, InFlight, Length, Work
from capstan.generation.planning.cache_buffers import Lanes
from capstan.generation.planning.forecast import DECODE, PREFILL
from capstan.generation.planning.job_plan import JobPlan
from capstan.generation.planning.memory import Extent, demand_of, extent_of
from capstan.generation.runtime.activations import Activations
from capstan.generation.runtime.arrivals import Arrivals, open_turns
from capstan.generation.runtime.block_schedule import BlockSchedule, Pick, picks_of
from capstan.generation.runtime.exchange import Exchange
from capstan.generation.runtime.kv_cache import KeyValueCache
from capstan.generation.runtime.measured import Measured, OnProgress, Progress
from capstan.generation.runtime.outcomes import (
    Form,
    Outcome,
    from_values,
    num_values,
    outcomes_of,
    take_over,
    to_values,
)
from capstan.generation.runtime.sequences import Sequence as Growing
from capstan.generation.runtime.weights import WeightStore
from capstan.plans import Phase
from capstan.storage import DiskSlab, SlabKeeper
from capstan.storage.live_bytes import LiveBytes
from capstan.transport import Lane, Ledger, Stopwatch

logger = logging.getLogger(__name__)


@dataclass
class _Turn:
    """A sweep over one wave: where logits are wanted, and what came of them if they were found here."""

    phase: str
    picks: list[Pick]
    outcomes: list[Outcome] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)


class Job:
    """Runs sequences through one plan. `run()` yields each sequence when it is over.

    With `arrivals`, others join while it runs, and it ends when those are closed.
    """

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
        arrivals: Arrivals | None = None,
    ) -> None:
        self._model, self._weights, self._plan = model, weights, plan
        self._left = {id(sequence): sequence for sequence in sequences}  # not delivered yet
        self._arrivals = arrivals
        self._device, self._disk_folder, self._ledger = device, disk_folder, ledger
        self._keeper, self._on_progress, self._keeps_cache = keeper, on_progress, keeps_cache
        self._num_sequences, self._num_finished = len(self._left), 0
        self._num_generated = self._num_sweeps = 0
        self._largest_sweep = (0, 0)
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
                smaller = shape.halved() if self._model.stage is None else None  # ranks keep in step
                if smaller is None:
                    if error.__cause__ is not None:
                        raise error.__cause__ from None
                    raise DoesNotFit(
                        f"{self._device} ran out of memory with {_slots_text(shape)}: {error}. "
                        "Lower --device-memory, or end what else runs there."
                    ) from error
                note = f"out of memory with {shape.num_slots} slots; went on with {smaller.num_slots}"
                logger.warning(note)
                self.measured.notes.append(note)
                shape = smaller
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _run_block(self, shape: BlockShape) -> Iterator[Growing]:
        yield from self._deliver(list(self._left.values()))  # what ended in a sweep that was cut short
        waiting = list(self._left.values())
        if not waiting and self._arrivals is None:
            return
        for sequence in waiting:
            if len(sequence.prompt_logprobs) < len(sequence.prompt) - 1:
                sequence.prompt_logprobs.clear()  # half of them, of a sweep that was cut short
        lengths = [sequence.length for sequence in waiting]
        planned = lengths if self._arrivals is None else self._plan.lengths
        block = self._block(shape, lengths)
        with _Resources(self, shape, planned) as resources:
            under_way: deque[_Turn | None] = deque()
            for works in self._turns(block, waiting):
                under_way.append(self._sweep(resources, works, waiting, block) if works else None)
                block.advance()
                # A wave's outcomes are wanted for its next turn; meanwhile other ranks are at its last one.
                turn = under_way.popleft() if len(under_way) == shape.waves else None
                if turn is not None:
                    self._settle(turn, resources, waiting)
                    block.finish(turn.ended)
                    if self._on_progress is not None:
                        self._on_progress(self._progress(block.num_running))
                    yield from self._deliver([waiting[index] for index in turn.ended])

    def _block(self, shape: BlockShape, lengths: Sequence[Length]) -> Block:
        if self._arrivals is None:
            return Block(shape, lengths)
        extent = extent_of(shape, self._plan.lengths)
        return Block(shape, lengths, most=InFlight(extent.sweep_tokens, extent.batch_tokens))

    def _turns(self, block: Block, waiting: list[Growing]) -> Iterator[list[BatchWork]]:
        if self._arrivals is None:
            return block.turns()
        return open_turns(self._arrivals, block, waiting, on_join=self._join, on_leave=self._leave)

    def _join(self, sequence: Growing) -> None:
        self._left[id(sequence)] = sequence
        self._num_sequences += 1

    def _leave(self, sequence: Growing) -> None:
        del self._left[id(sequence)]

    def _deliver(self, sequences: Sequence[Growing]) -> Iterator[Growing]:
        """Yield those that are over, each once."""
        for sequence in sequences:
            if sequence.finish_reason is not None and self._left.pop(id(sequence), None) is not None:
                yield sequence

    def _sweep(
        self, resources: "_Resources", works: list[BatchWork], waiting: list[Growing], block: Block
    ) -> _Turn:
        """Compute a sweep."""
        has_prompts = any(chunk.is_prefill for work in works for chunk in work.chunks)

        def positions_of(work: Work) -> range:
            return self._positions(work, waiting[work.sequence])

        picks = [pick for work in works for pick, _ in picks_of(work, positions_of)]
        turn = _Turn(PREFILL if has_prompts else DECODE, picks)

        def on_logits(picks: Sequence[Pick], logits: Tensor) -> None:
            outcomes = outcomes_of(picks, logits.float(), waiting, generates=self._keeps_cache)
            turn.outcomes.extend(outcomes)
            turn.ended.extend(self._take_over(picks, outcomes, waiting))

        with self._watching(works) as live, self._measuring(turn.phase):
            resources.schedule.sweep(
                works,
                tokens_of=lambda work: [
                    waiting[work.sequence].token(at) for at in range(work.start, work.end)
                ],
                positions_of=positions_of,
                on_logits=on_logits,
                is_last=not block.goes_on,
            )
            if resources.exchange is not None and resources.exchange.has_back:
                resources.exchange.tell(to_values(turn.outcomes))
            resources.settle()
        if live is not None:
            self.measured.workspace_bytes = max(self.measured.workspace_bytes, live.peak_bytes)
        self._num_sweeps += 1
        return turn

    def _settle(self, turn: _Turn, resources: "_Resources", waiting: list[Growing]) -> None:
        """Where the outcomes of a turn were found elsewhere, hear them."""
        if resources.exchange is None or resources.exchange.has_back:
            return
        form = Form(self._keeps_cache, self._model.meta_model.vocabulary_size)
        with self._measuring(turn.phase):
            values = resources.exchange.hear(num_values(turn.picks, waiting, form))
            turn.outcomes = from_values(values, turn.picks, waiting, form)
            turn.ended = self._take_over(turn.picks, turn.outcomes, waiting)

    def _take_over(
        self, picks: Sequence[Pick], outcomes: Sequence[Outcome], waiting: list[Growing]
    ) -> list[int]:
        self._num_generated += sum(outcome.token is not None for outcome in outcomes)
        ended = take_over(picks, outcomes, waiting)
        self._num_finished += len(ended)
        return ended

    def _positions(self, work: Work, sequence: Growing) -> range:
        """Where logits are wanted: at the last token, or at every one of a prompt that is to be scored."""
        if work.is_prefix:
            return range(0)
        if not self._keeps_cache or (sequence.request.prompt_logprobs is not None and work.start == 0):
            is_scored = len(sequence.prompt_logprobs) == len(sequence.prompt) - 1
            first = work.end - 1 if is_scored else 0
            return range(first, work.end)
        return range(work.end - 1, work.end)

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

    @contextmanager
    def _measuring(self, phase: str) -> Iterator[None]:
        """Add to a phase what happens inside."""
        ledger, start_s, num_before = self._ledger, time.perf_counter(), self._num_generated
        traffic, busy_s = ledger.traffic, ledger.busy_s
        yield
        self.measured.add(
            Phase(
                name=phase,
                seconds=time.perf_counter() - start_s,
                busy_s={name: spent - busy_s.get(name, 0.0) for name, spent in ledger.busy_s.items()},
                traffic=ledger.traffic - traffic,
                counts={"tokens": self._num_generated - num_before},
            )
        )

    def _progress(self, num_running: int) -> Progress:
        return Progress(
            num_sequences=self._num_sequences,
            num_finished=self._num_finished,
            num_generated=self._num_generated,
            num_sweeps=self._num_sweeps,
            num_running=num_running,
            seconds=time.perf_counter() - self._start_s,
        )


def _slots_text(shape: BlockShape) -> str:
    return "a single sequence" if shape.num_slots == 1 else f"{shape.num_slots} sequences"


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
        names = ("cache in", "cache out", "host attention", "activations in", "activations out")
        self._lanes = [self._stack.enter_context(Lane(name, device=device, ledger=ledger)) for name in names]
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
            width=model.meta_model.hidden_size,
            dtype=model.meta_model.compute_dtype,
            sweep_tokens=extent.sweep_tokens,
            batch_tokens=extent.batch_tokens,
            device=device,
            disk=disk,
            lane_in=hidden_in,
            lane_out=hidden_out,
        )
        self._stack.callback(activations.close)
        self.exchange = self._exchange(extent)
        sent_bytes = self.exchange.device_bytes if self.exchange else 0
        job.note_memory(
            device=activations.device_bytes + sent_bytes + (cache.device_bytes if cache else 0),
            host=activations.host_bytes + (cache.host_bytes if cache else 0),
        )
        self._stopwatch = Stopwatch(ledger, device)
        self.schedule = BlockSchedule(
            model.meta_model,
            model.profile,
            job._weights,
            activations,
            cache=cache,
            exchange=self.exchange,
            logit_rows=job._plan.logit_rows,
            device=device,
            ledger=ledger,
            stopwatch=self._stopwatch,
        )

    def _exchange(self, extent: Extent) -> Exchange | None:
        """The way to the other ranks, if there are any."""
        job, model = self._job, self._job._model
        if model.stage is None:
            return None
        sweep_bytes = extent.sweep_tokens * model.hidden_bytes
        exchange = Exchange(
            model.stage,
            outbox_bytes=outbox_bytes(model.stage, sweep_bytes=sweep_bytes),
            waves=self._shape.waves,
            device=job._device,
            ledger=job._ledger,
        )
        self._stack.callback(exchange.close)
        return exchange

    def settle(self) -> None:
        """Wait for what is on its way, and book its time."""
        for lane in self._lanes:
            lane.drain()
            lane.stopwatch.settle()
        self._job._weights.settle()
        self._stopwatch.settle()

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self.exchange is not None and kind is None:
                self.exchange.finish()
            self._job._weights.forget()
        finally:
            for lane in self._lanes:
                lane.close()
            self._stack.close()
