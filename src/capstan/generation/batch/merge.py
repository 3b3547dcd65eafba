"""Many outputs, one file: what the shards of a batch file answered, in the order of its lines.

Only where each answer lies is kept in memory, not what it says. Nothing is written before it is known that
every line of the batch file has exactly one answer.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from capstan.errors import CapstanError, InputError, UsageError
from capstan.generation.batch.ids import batch_lines, line_names, text_lines
from capstan.generation.batch.journal import changes, job_file, job_of
from capstan.generation.batch.shard import WHOLE, Shard
from capstan.storage import open_atomically

_NUM_SHOWN = 10
# Where an answer lies: which output, from 1, or 0 for none; its line; its first byte.
_PLACE = np.dtype([("output", np.uint32), ("line", np.uint64), ("start", np.uint64)])


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge wrote: answers, and errors of lines that cannot be answered."""

    num_answered: int
    num_errors: int
    size_bytes: int


def merge(outputs: Sequence[Path], batch: Path, target: Path, *, overwrite: bool = False) -> MergeReport:
    """Write the answers of `outputs` to `target`, in the order of the lines of `batch`: all or nothing.

    Raises:
        UsageError: `target` is one of the files to be read.
        InputError: `target` exists, a file cannot be read, or not every line is answered exactly once.
        DoesNotFit: there is no room for `target`.
    """
    _check_target(target, (*outputs, batch), overwrite)
    merging = _Merging(outputs, batch)
    troubles = merging.troubles()
    shown = list(islice(troubles, _NUM_SHOWN))
    if shown:
        num_more = sum(1 for _ in troubles)
        rest = [f"… and {num_more:,} more."] if num_more else []
        raise InputError("\n  ".join([f"{target} was not written:", *shown, *rest]))
    merging.write(target)
    return MergeReport(
        num_answered=len(merging.numbers) - merging.num_errors,
        num_errors=merging.num_errors,
        size_bytes=target.stat().st_size,
    )


def _check_target(target: Path, read: Sequence[Path], overwrite: bool) -> None:
    if target.resolve() in {path.resolve() for path in read}:
        raise UsageError(f"{target} is one of the files to merge. Name another --output.")
    if target.is_dir() or job_file(target).exists():
        kind = "a folder" if target.is_dir() else "the output of a batch job"
        raise InputError(f"{target} is {kind}. Name another --output.")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists. Name another --output, or replace it with --overwrite.")


class _Merging:
    """The lines of a batch file by custom_id, and where each is answered, by line number."""

    def __init__(self, outputs: Sequence[Path], batch: Path) -> None:
        self._outputs, self._batch = outputs, batch
        digest = hashlib.sha256()
        lines = batch_lines(text_lines(batch, digest.update), line_names(text_lines(batch)))
        self.numbers = {line.custom_id: line.number for line in lines}
        self.num_errors = 0
        self._digest = digest.hexdigest()
        self._places = np.zeros(max(self.numbers.values(), default=0) + 1, dtype=_PLACE)
        self._shards: dict[Path, Shard] = {}

    def troubles(self) -> Iterator[str]:
        """Read the outputs, and say in words all that is wrong."""
        read = chain.from_iterable(map(self._read, range(len(self._outputs))))
        return chain(self._jobs(), read, self._unanswered())

    def _jobs(self) -> Iterator[str]:
        """Outputs of other jobs, as far as the files beside them say what jobs they are of."""
        first: tuple[Path, dict[str, Any]] | None = None
        for output in self._outputs:
            try:
                job = job_of(output)
                if job is None:
                    continue
                shard = job.pop("--shard", None)
                self._shards[output] = WHOLE if shard is None else Shard.parse(str(shard))
            except (CapstanError, OSError) as error:
                yield str(error)
                continue
            if job.pop("input", None) != self._digest:
                yield f"{output} answers another file than {self._batch}, as {job_file(output)} says."
            first = first or (output, job)
            if changed := changes(first[1], job):
                yield f"{output} is of a job with another {changed} than {first[0]}."

    def _read(self, index: int) -> Iterator[str]:
        output, start = self._outputs[index], 0
        try:
            with output.open("rb") as file:
                for line, data in enumerate(file, start=1):
                    trouble = self._place(data, (index + 1, line, start))
                    if trouble is not None:
                        yield f"{output}, line {line}, {trouble}"
                    start += len(data)
        except OSError as error:
            yield f"{output} cannot be read: {error.strerror}."

    def _place(self, data: bytes, place: tuple[int, int, int]) -> str | None:
        """Note where an answer lies; returns what is wrong with it."""
        if not data.endswith(b"\n"):
            return "is torn: its job was stopped while it wrote. Run that job's command again."
        try:
            answer = json.loads(data)
            custom_id, error = answer["custom_id"], answer["error"]
            number = self.numbers.get(custom_id)
        except (ValueError, KeyError, TypeError, RecursionError):
            return "is not an answer that a batch job wrote."
        if number is None:
            return f"answers custom_id {custom_id!r}, which {self._batch} does not have."
        known = self._places[number]
        if known["output"]:
            before = self._outputs[known["output"] - 1]
            return f"answers custom_id {custom_id!r}, and so does {before}, line {known['line']}."
        self._places[number] = place
        self.num_errors += error is not None
        return None

    def _unanswered(self) -> Iterator[str]:
        for position, (custom_id, number) in enumerate(self.numbers.items(), start=1):
            if not self._places[number]["output"]:
                yield (
                    f"{self._batch}, line {number}, custom_id {custom_id!r}, is not answered: "
                    f"{self._why_unanswered(position)}"
                )

    def _why_unanswered(self, position: int) -> str:
        for output, shard in self._shards.items():
            if shard.holds(position):
                return f"{output} is not finished (shard {shard}). Run its command again."
        return "none of the outputs has it. Is a shard missing?"

    def write(self, target: Path) -> None:
        """Copy every answer; a reader of `target` finds all of them or what was there before."""
        with ExitStack() as stack:
            files = [stack.enter_context(output.open("rb")) for output in self._outputs]
            merged = stack.enter_context(open_atomically(target))
            for number in self.numbers.values():
                place = self._places[number]
                file = files[place["output"] - 1]
                file.seek(int(place["start"]))
                merged.write(file.readline())
