"""The engine: a model, its weights in place, and the jobs that run on it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import torch
from torch.nn.attention import sdpa_kernel

from capstan.errors import UsageError
from capstan.generation.attention.packed import (
    FUSED_ATTENTION,
    decode_attention,
    prefill_attention,
    visible_rows,
)
from capstan.generation.model import Model
from capstan.generation.planning.batching import BlockShape, Length
from capstan.generation.planning.cache_buffers import host_bytes
from capstan.generation.planning.job_plan import JobPlan
from capstan.generation.planning.memory import extent_of
from capstan.generation.planning.opening import plan_for
from capstan.generation.planning.planner import Planner
from capstan.generation.planning.prefixes import shared_prefix
from capstan.generation.prompts import check_bias, check_length, tokens_of
from capstan.generation.requests import Completion, Request, Score
from capstan.generation.runtime.arrivals import Arrivals
from capstan.generation.runtime.job import Job
from capstan.generation.runtime.measured import OnProgress
from capstan.generation.runtime.sequences import Sequence as Growing
from capstan.generation.runtime.sequences import completion_of
from capstan.generation.runtime.weights import WeightStore
from capstan.hardware import Machine
from capstan.plans import Plan, Trace
from capstan.storage import Checkpoint, DiskSlab, SlabKeeper
from capstan.storage.slab import aligned
from capstan.transport import Group, Ledger, stream_of

# What an engine is opened for when nobody says: enough sequences that the block is not the limit.
USUAL_LENGTHS = (Length(prompt=512, new=128),) * 64


class Engine:
    """Generates with a model that may be larger than the memory granted to it.

        with Engine.open("models/llama", device_memory="8GiB", host_memory="32GiB") as engine:
            print(engine.plan)
            for completion in engine.generate([Request(prompt="Once upon a time")]):
                print(completion.text)

    `plan` is the plan of the last job (or of the opening), `trace` what the last job was seen to take.
    """

    def __init__(
        self,
        planner: Planner,
        opening: JobPlan,
        weights: WeightStore,
        device: torch.device,
        disk_folder: Path | None,
        ledger: Ledger,
        *,
        keeper: SlabKeeper,
        closing: ExitStack,
    ) -> None:
        self.model: Model = planner.model
        self._planner, self._opening, self._weights = planner, opening, weights
        self._device, self._disk_folder, self._ledger = device, disk_folder, ledger
        self._keeper, self._closing = keeper, closing
        self.plan: Plan = opening.plan
        self.trace: Trace | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        device_memory: str | int | None = None,
        host_memory: str | int | None = None,
        disk: str | Path | None = None,
        weight_bits: int | None = None,
        cache_bits: int | None = None,
        place: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        lengths: Sequence[Length] = USUAL_LENGTHS,
        prefix: int = 0,
        share_prefixes: bool | None = None,
        machine: Machine | None = None,
        checkpoint: Checkpoint | None = None,
        group: Group | Literal["auto"] | None = None,
    ) -> Self:
        """Open a model folder in Hugging Face format, plan, and bring the weights to their places.

        Args:
            folder: has config.json, *.safetensors and, for text, a tokenizer.
            device: "cuda", "cpu" (a slice of host memory plays the device), or "auto".
            device_memory, host_memory: what may be used, as `"8GiB"` or bytes; default: most of what is free.
            disk: a folder for scratch files, if the cache, activations or quantised weights may go to disk.
                Weights in their own bits are read from `folder` in place and need none.
            weight_bits, cache_bits: 16, 8 or 4; None for the checkpoint's own.
            place: a placement by hand, as `["weights=device:0.3,host:0.7", "cache=host"]`.
            dtype: what to compute in; None chooses what this machine computes fastest without loss.
            lengths: what the engine will mostly be asked for, so that it is planned for that.
            prefix: how many tokens all prompts of such a job begin with.
            share_prefixes: whether tokens that all prompts of a job begin with are computed and stored once;
                None does where the plan predicts it to be faster.
            machine: measured rates; None takes this machine's cached profile, or probes it for some seconds.
            checkpoint: where weights come from, if not from `folder`.
            group: the ranks over which the layers are divided, all of which must call this and then ask the
                same of their engines; "auto" for torch's default group, or torchrun's, if there is one; None
                for this process alone.

        Raises:
            InputError, UnsupportedModel: the folder does not hold a model that this engine can run.
            DoesNotFit: the budgets are too small even for one sequence.
            UsageError: a malformed size or placement.
        """
        planner, torch_device = plan_for(
            folder,
            device=device,
            device_memory=device_memory,
            host_memory=host_memory,
            disk=disk,
            weight_bits=weight_bits,
            cache_bits=cache_bits,
            place=place,
            dtype=dtype,
            share_prefixes=share_prefixes,
            machine=machine,
            checkpoint=checkpoint,
            group=group,
        )
        opening = planner.plan(lengths, prefix=0 if share_prefixes is False else prefix)
        return cls.start(planner, opening, torch_device, disk_folder=Path(disk) if disk else None)

    @classmethod
    def start(
        cls,
        planner: Planner,
        opening: JobPlan,
        device: torch.device,
        *,
        disk_folder: Path | None = None,
        on_loaded: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Bring the weights to where `opening`, a plan of `planner`, wants them.

        `on_loaded` hears how many bytes of the checkpoint are done, and of how many.
        """
        model, tiers = planner.model, opening.placement.weights
        ledger = Ledger()
        encoded_bytes = sum(
            aligned(each.stored_bytes)
            for each in model.manifest.placeable.values()
            if tiers[each.name] == "disk" and not each.is_as_in_checkpoint
        )
        with ExitStack() as opened:  # closed again if anything below fails
            opened.callback(model.checkpoint.close)
            disk = None
            if encoded_bytes and disk_folder:
                disk = opened.enter_context(DiskSlab(disk_folder, encoded_bytes))
            model.meta_model.to(device)
            weights = WeightStore(
                model.manifest,
                tiers,
                ring_slots=opening.placement.ring_slots,
                checkpoint=model.checkpoint,
                sources=model.sources,
                device=device,
                disk=disk,
                ledger=ledger,
            )
            opened.callback(weights.close)
            with torch.inference_mode():
                for done in weights.load():
                    if on_loaded is not None:
                        on_loaded(done, model.checkpoint.size_bytes)
            keeper = SlabKeeper("KV cache on the host", pinned=device.type == "cuda")
            opened.callback(keeper.close)
            if device.type == "cuda":
                keeper.give_back(keeper.take(_cache_host_bytes(model, opening)))
                _wake_libraries(model, device)
            return cls(
                planner,
                opening,
                weights,
                device,
                disk_folder,
                ledger,
                keeper=keeper,
                closing=opened.pop_all(),
            )

    # --- jobs --------------------------------------------------------------------------------------------

    def generate(
        self, requests: Iterable[Request], *, on_progress: OnProgress | None = None
    ) -> Iterator[Completion]:
        """Answer requests; completions come as they are done, not in the order asked.

        A request without an id gets its index as one.

        Raises:
            InputError: an empty prompt, one that does not fit the model's context, or a bias for a token that
                the model does not have.
        """
        asked = [
            request if request.id else replace(request, id=str(index))
            for index, request in enumerate(requests)
        ]
        sequences = [
            growing for index, request in enumerate(asked) for growing in self._sequences(index, request)
        ]
        if not sequences:
            return
        answered: dict[int, dict[int, Growing]] = {}
        for growing in self._run(sequences, keeps_cache=True, on_progress=on_progress):
            mine = answered.setdefault(growing.request_index, {})
            mine[growing.answer] = growing
            if len(mine) == growing.request.n:
                del answered[growing.request_index]
                yield completion_of([mine[answer] for answer in range(growing.request.n)])

    def score(self, texts: Iterable[str | Sequence[int]], *, likeliest: bool = False) -> list[Score]:
        """The log-probability of every token of each text given the ones before it, in the order given; with
        `likeliest` also whether it was the likeliest token there."""
        asked = [
            Request(prompt=text, max_tokens=1, prompt_logprobs=1 if likeliest else None, id=str(index))
            for index, text in enumerate(texts)
        ]
        sequences = [
            growing
            for index, request in enumerate(asked)
            for growing in self._sequences(index, request, fits=0)
        ]
        if not sequences:
            return []
        for _ in self._run(sequences, keeps_cache=False, on_progress=None):
            pass
        return [
            Score(
                tokens=tuple(growing.prompt),
                logprobs=tuple(entry.logprob for entry in growing.prompt_logprobs),
                likeliest=tuple(entry.token == entry.top[0][0] for entry in growing.prompt_logprobs)
                if likeliest
                else (),
            )
            for growing in sequences
        ]

    def answer(self, arrivals: Arrivals, *, on_progress: OnProgress | None = None) -> Iterator[Growing]:
        """Answer sequences that arrive while others run, until `arrivals` are closed; each comes back when it
        is over, unless it was not wanted any more.

        The plan is that of the opening. An arrival must be no longer than the longest sequence of its
        `lengths` (`open_lengths` makes fitting ones), prompt and new tokens together.

        Raises:
            UsageError: the model is divided over ranks, which must all know what runs.
        """
        if self.model.stage is not None:
            raise UsageError("A model that is divided over ranks cannot serve; give it whole jobs.")
        yield from self._run_job(self._opening, [], on_progress=on_progress, arrivals=arrivals)

    def sequences(self, request: Request) -> list[Growing]:
        """The sequences that answer a request, one for each answer, as `answer` takes them.

        Raises:
            InputError: an empty prompt, one that does not fit the model's context, or a bias for a token that
                the model does not have.
        """
        return self._sequences(0, request)

    @property
    def block(self) -> BlockShape:
        """The block that the engine was opened for."""
        return self._opening.shape

    def plan_job(self, lengths: Sequence[Length], *, keeps_cache: bool = True, prefix: int = 0) -> JobPlan:
        """The plan for sequences of these lengths, of which the first `prefix` tokens are the same, with the
        weights where they lie."""
        opening = self._opening
        if keeps_cache and prefix == opening.common and sorted(lengths) == sorted(opening.lengths):
            return opening
        return self._planner.plan(lengths, opened=opening.placement, keeps_cache=keeps_cache, prefix=prefix)

    def _sequences(self, index: int, request: Request, *, fits: int | None = None) -> list[Growing]:
        prompt = tokens_of(self.model, request.prompt)
        check_length(self.model, len(prompt), request.max_tokens if fits is None else fits)
        check_bias(self.model, request.logit_bias)
        return [
            Growing(
                request=request,
                request_index=index,
                answer=answer,
                prompt=prompt,
                stop_tokens=self.model.stop_tokens,
                tokenizer=self.model.tokenizer,
            )
            for answer in range(request.n)
        ]

    def _run(
        self, sequences: list[Growing], *, keeps_cache: bool, on_progress: OnProgress | None
    ) -> Iterator[Growing]:
        prefix = 0
        if keeps_cache and self._planner.shares_prefixes is not False:
            asked, prompts = [each.request for each in sequences], [each.prompt for each in sequences]
            prefix = shared_prefix(asked, prompts)
        lengths = [growing.length for growing in sequences]
        job_plan = self.plan_job(lengths, keeps_cache=keeps_cache, prefix=prefix)
        yield from self._run_job(job_plan, sequences, keeps_cache=keeps_cache, on_progress=on_progress)

    def _run_job(
        self,
        job_plan: JobPlan,
        sequences: list[Growing],
        *,
        keeps_cache: bool = True,
        on_progress: OnProgress | None = None,
        arrivals: Arrivals | None = None,
    ) -> Iterator[Growing]:
        self.plan, self.trace = job_plan.plan, None
        job = Job(
            self.model,
            self._weights,
            job_plan,
            sequences,
            device=self._device,
            disk_folder=self._disk_folder,
            ledger=self._ledger,
            keeper=self._keeper,
            on_progress=on_progress,
            keeps_cache=keeps_cache,
            arrivals=arrivals,
        )
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield from job.run()
        finally:
            self.trace = self._trace(job)

    def _trace(self, job: Job) -> Trace:
        measured = job.measured
        if self._device.type == "cuda":
            device_peak = torch.cuda.max_memory_allocated(self._device)
        else:
            device_peak = self._weights.device_bytes + job.device_bytes + measured.workspace_bytes
        return Trace(
            system=self.plan.system,
            title=self.plan.title,
            machine=self.plan.machine,
            phases=tuple(measured.phases.values()),
            peak_bytes={"device": device_peak, "host": self._weights.host_bytes + job.host_bytes},
            notes=tuple(measured.notes),
        )

    def close(self) -> None:
        """Give all memory and scratch space back."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cache_host_bytes(model: Model, plan: JobPlan) -> int:
    tokens = extent_of(plan.shape, plan.lengths).chunk_tokens
    return host_bytes(model.formats, plan.placement, plan.shape, tokens=tokens)


def _wake_libraries(model: Model, device: torch.device) -> None:
    """Libraries load their kernels when first used, about a second's work: not in the first job's time. Some
    keep memory for each stream that they work on."""
    with torch.cuda.stream(stream_of(device, "compute")), sdpa_kernel(FUSED_ATTENTION):
        _use_libraries(model, device)


def _use_libraries(model: Model, device: torch.device) -> None:
    dtype, geometry = model.meta_model.compute_dtype, model.profile.layers[0].geometry
    hidden = torch.zeros(64, model.meta_model.hidden_size, dtype=dtype, device=device)
    heads = torch.zeros(64, geometry.num_query_heads, geometry.key_size, dtype=dtype, device=device)
    if geometry.key_size == geometry.value_size:
        keys = heads[:, : geometry.num_key_heads]
        prefill_attention(heads, keys, keys, geometry)
        visible = visible_rows(torch.full((64,), 64), 64, None).to(device)
        decode_attention(heads, keys.expand(64, *keys.shape), keys.expand(64, *keys.shape), visible, geometry)
    (hidden @ hidden.T).softmax(-1).argmax(-1).tolist()
