"""The batch job: a file of requests in, a file of answers out, each answered exactly once."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from capstan.generation.batch.answers import answer_line, error_line
from capstan.generation.batch.ids import line_names, text_lines
from capstan.generation.batch.journal import Journal
from capstan.generation.batch.lines import BadLine, BatchRequest, parse_lines
from capstan.generation.batch.rank_journal import FollowedJournal, open_together
from capstan.generation.batch.shard import WHOLE, Shard
from capstan.generation.engine import Engine
from capstan.generation.model import Model
from capstan.generation.planning.batching import Length
from capstan.generation.planning.job_plan import JobPlan
from capstan.generation.planning.planner import Planner
from capstan.generation.planning.prefixes import shared_prefix
from capstan.generation.runtime.measured import OnProgress, Progress
from capstan.models.decoded_checkpoint import DecodedCheckpoint
from capstan.plans import Plan, Trace

_SAMPLE_BYTES = 256
_TEXT_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


@dataclass(frozen=True, kw_only=True)
class BatchFile:
    """A parsed input file, or the share of it that is to be answered."""

    path: Path
    digest: str
    created: int
    max_tokens: int
    shard: Shard
    lines: Sequence[BatchRequest | BadLine]

    @property
    def requests(self) -> list[BatchRequest]:
        return [line for line in self.lines if isinstance(line, BatchRequest)]

    @property
    def bad_lines(self) -> list[BadLine]:
        return [line for line in self.lines if isinstance(line, BadLine)]


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """How a batch job ended. `plan` and `trace` are None when nothing was left to answer."""

    num_answered: int
    num_errors: int
    num_answered_before: int
    plan: Plan | None
    trace: Trace | None


def read_batch(
    path: Path, model: Model, *, max_tokens: int, shard: Shard = WHOLE, called: str | None = None
) -> BatchFile:
    """Read an input file and parse a shard of it. `called` is its name in errors; None for its path.

    Raises:
        InputError: there is no such file, or it is not text.
    """
    digest = hashlib.sha256()
    lines = parse_lines(
        text_lines(path, digest.update, called=called),
        model,
        max_tokens=max_tokens,
        shard=shard,
        taken=line_names(text_lines(path, called=called)),
    )
    return BatchFile(
        path=path,
        digest=digest.hexdigest(),
        created=int(path.stat().st_mtime),
        max_tokens=max_tokens,
        shard=shard,
        lines=lines,
    )


def lengths_of(requests: Sequence[BatchRequest]) -> list[Length]:
    """The lengths that a planner needs, one for each answer."""
    return [
        Length(len(asked.request.prompt), asked.request.max_tokens)
        for asked in requests
        for _ in range(asked.request.n)
    ]


def prefix_of(requests: Sequence[BatchRequest], planner: Planner) -> int:
    """How many tokens all prompts begin with, if they may be computed once."""
    asked = [each.request for each in requests for _ in range(each.request.n)]
    return 0 if planner.shares_prefixes is False else shared_prefix(asked)


def open_journal(
    batch: BatchFile, output: Path, model: Model, *, overwrite: bool
) -> Journal | FollowedJournal:
    """The output file, ready to be appended to; see `Journal` for when it refuses. Of several ranks, the
    first has it."""
    codecs = {tensor.codec.name for unit in model.manifest.units for tensor in unit}
    job = {
        "input": batch.digest,
        "--shard": None if batch.shard == WHOLE else str(batch.shard),
        "--max-tokens": batch.max_tokens,
        "model": _fingerprint(model),
        "tokenizer or chat template": _text_fingerprint(model.folder),
        "weights": sorted(codecs),
        "cache": sorted({layout.codec.name for layout in model.formats}),
    }

    def open_here() -> Journal:
        return Journal(output, job, overwrite=overwrite)

    return open_here() if model.stage is None else open_together(model.stage.group, batch.digest, open_here)


def _fingerprint(model: Model) -> str:
    """What the model is: its configuration, its tensors' shapes, and some bytes of each."""
    digest = hashlib.sha256(model.meta_model.config.to_json_string().encode())
    checkpoint = model.checkpoint
    if isinstance(checkpoint, DecodedCheckpoint):  # of which reading a little decodes much
        checkpoint = checkpoint.stored
    for name, entry in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        sample = torch.empty(min(_SAMPLE_BYTES, entry.size_bytes), dtype=torch.uint8)
        for start in (0, (entry.size_bytes - len(sample)) // 2, entry.size_bytes - len(sample)):
            checkpoint.read(name, sample, start=start)
            digest.update(bytes(sample.tolist()))
    return digest.hexdigest()


def _text_fingerprint(folder: Path) -> str:
    """What turns text into tokens and back, and where answers end: the small files beside the weights."""
    digest = hashlib.sha256()
    for name in _TEXT_FILES:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            digest.update(f"{name} {len(data)} ".encode() + data)
    return digest.hexdigest()


def run_batch(
    batch: BatchFile,
    journal: Journal | FollowedJournal,
    planner: Planner,
    device: torch.device,
    *,
    disk_folder: Path | None = None,
    on_plan: Callable[[JobPlan], None] | None = None,
    on_loaded: Callable[[int, int], None] | None = None,
    on_progress: OnProgress | None = None,
) -> BatchReport:
    """Answer what the journal does not hold yet."""
    before = len(journal.answered)
    bad = [line for line in batch.bad_lines if line.custom_id not in journal.answered]
    journal.append([error_line(line) for line in bad])
    waiting = [asked for asked in batch.requests if asked.custom_id not in journal.answered]
    plan: Plan | None = None
    trace: Trace | None = None
    if waiting:
        opening = planner.plan(lengths_of(waiting), prefix=prefix_of(waiting, planner))
        if on_plan is not None:
            on_plan(opening)
        with Engine.start(planner, opening, device, disk_folder=disk_folder, on_loaded=on_loaded) as engine:
            _answer(waiting, engine, journal, created=batch.created, on_progress=on_progress)
            plan, trace = engine.plan, engine.trace
    return BatchReport(
        num_answered=len(waiting),
        num_errors=len(bad),
        num_answered_before=before,
        plan=plan,
        trace=trace,
    )


def _answer(
    waiting: Sequence[BatchRequest],
    engine: Engine,
    journal: Journal | FollowedJournal,
    *,
    created: int,
    on_progress: OnProgress | None,
) -> None:
    asked_by_id = {asked.custom_id: asked for asked in waiting}
    ready: list[dict[str, Any]] = []

    def write_then_report(progress: Progress) -> None:
        # Called once a sweep, before its own completions: what is ready is of the sweeps before.
        journal.append(ready)
        ready.clear()
        if on_progress is not None:
            on_progress(progress)

    completions = engine.generate([asked.request for asked in waiting], on_progress=write_then_report)
    for completion in completions:
        asked = asked_by_id[completion.id]
        ready.append(answer_line(asked, completion, engine.model, created=created))
    journal.append(ready)
