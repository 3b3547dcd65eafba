"""Batches: files of requests, answered beside the requests of those who wait.

    FOLDER/batches/batch-0123….json     what is known of the batch
    FOLDER/batches/batch-0123….jsonl    its journal: a line for each answer, as `capstan generate` writes it

One batch runs at a time, in the order in which they came. Its sequences take slots that nobody in a hurry
wants, and give them up before the next sweep when somebody does. After a stop or kill -9 a server over the
same folder goes on with it; every line is answered once.
"""

import asyncio
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from capstan.errors import CapstanError, InputError
from capstan.generation.batch.answers import answer_line, error_line
from capstan.generation.batch.job import BatchFile, open_journal, read_batch
from capstan.generation.batch.journal import Journal
from capstan.generation.batch.lines import BadLine, BatchRequest
from capstan.generation.serving.bodies import CHAT, require_room
from capstan.generation.serving.crew import Ask, Crew, CrewGone
from capstan.generation.serving.files import (
    FileStore,
    Json,
    is_id,
    new_id,
    newest_first,
    write_object,
)
from capstan.generation.serving.limits import Limits
from capstan.generation.serving.replies import Refused

logger = logging.getLogger(__name__)

ENDED = frozenset({"completed", "failed", "cancelled"})
# Of what is stored with a batch, the part that is nobody else's business.
_PRIVATE = ("reserved_output_id", "reserved_error_id")


class BatchRunner:
    """Runs the batches of a server, one after the other."""

    def __init__(self, store: FileStore, crew: Crew, limits: Limits, *, name: str) -> None:
        self._store, self._crew, self._limits, self._name = store, crew, limits, name
        self._folder = store.folder / "batches"
        self._folder.mkdir(exist_ok=True)
        self._known = {each["id"]: each for each in newest_first(self._folder.glob("batch-*.json"))}
        self._news = asyncio.Event()
        self._cancels: dict[str, asyncio.Event] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Go on with what was not finished, then wait for more."""
        self._task = asyncio.create_task(self._run_all())

    async def close(self) -> None:
        """Stop; what is not answered is for the next server."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    # --- what clients ask --------------------------------------------------------------------------------

    def add(self, *, input_file_id: str, endpoint: str, window: str, metadata: Json | None) -> Json:
        """A new batch."""
        self._store.about(input_file_id)
        batch = {
            "id": new_id("batch"),
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_file_id,
            "completion_window": window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(time.time()),
            "in_progress_at": None,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
            "reserved_output_id": new_id("file"),
            "reserved_error_id": new_id("file"),
        }
        self._note(batch)
        self._news.set()
        return shown(batch)

    def get(self, identity: str) -> Json:
        """A batch; `Refused` with 404 if there is none."""
        return shown(self._get(identity))

    def _get(self, identity: str) -> Json:
        if not is_id(identity, "batch") or identity not in self._known:
            raise Refused(404, f"There is no batch {identity!r} here.", param="batch_id")
        return self._known[identity]

    def all(self) -> list[Json]:
        """All batches, the newest first."""
        ordered = sorted(self._known.values(), key=lambda each: (each["created_at"], each["id"]))
        return [shown(each) for each in reversed(ordered)]

    def cancel(self, identity: str) -> Json:
        """Answer no more of a batch; what is answered stays."""
        batch = self._get(identity)
        if batch["status"] in ENDED:
            raise Refused(409, f"{identity} has ended: it is {batch['status']}.")
        self._note(batch, status="cancelling", cancelling_at=int(time.time()))
        self._cancels.setdefault(identity, asyncio.Event()).set()
        return shown(batch)

    def _note(self, batch: Json, **changes: Any) -> None:
        batch |= changes
        self._known[batch["id"]] = batch
        write_object(self._folder / f"{batch['id']}.json", batch)

    # --- running them ------------------------------------------------------------------------------------

    async def _run_all(self) -> None:
        while True:
            self._news.clear()
            waiting = [each for each in reversed(self.all()) if each["status"] not in ENDED]
            for each in waiting:
                await self._run(self._known[each["id"]])
            if not waiting:
                await self._news.wait()

    async def _run(self, batch: Json) -> None:
        cancelled = self._cancels.setdefault(batch["id"], asyncio.Event())
        if batch["status"] == "cancelling":
            cancelled.set()
        try:
            parsed = await asyncio.to_thread(self._read, batch)
            journal = await asyncio.to_thread(self._open, batch, parsed)
            with journal:
                if not cancelled.is_set():
                    await self._answer(batch, parsed, journal, cancelled)
            now = {} if cancelled.is_set() else {"status": "finalizing", "finalizing_at": int(time.time())}
            self._note(batch, **now)
            await asyncio.to_thread(self._finish, batch, is_cancelled=cancelled.is_set())
        except CrewGone:
            # Not the batch's fault: the journal has what was answered. Once the engine has failed for good,
            # going on is for the next server.
            if self._crew.failure is not None:
                await asyncio.Event().wait()
        except (CapstanError, Refused, OSError) as error:
            logger.warning("%s failed: %s", batch["id"], error)
            message = str(error.strerror) if isinstance(error, OSError) else str(error)
            fault = {"code": "batch_failed", "message": message, "param": None, "line": None}
            errors = {"object": "list", "data": [fault]}
            self._note(batch, status="failed", failed_at=int(time.time()), errors=errors)
        finally:
            self._cancels.pop(batch["id"], None)

    def _read(self, batch: Json) -> BatchFile:
        path = self._store.data(batch["input_file_id"])
        model, called = self._crew.engine.model, f"The file {batch['input_file_id']}"
        return read_batch(path, model, max_tokens=self._limits.max_tokens, called=called)

    def _journal(self, batch: Json) -> Path:
        return self._folder / f"{batch['id']}.jsonl"

    def _open(self, batch: Json, parsed: BatchFile) -> Journal:
        if not parsed.lines:
            raise InputError("The input file has no request.")
        try:
            journal = open_journal(parsed, self._journal(batch), self._crew.engine.model, overwrite=False)
        except InputError as error:  # names files of the server, which are nobody's business
            logger.warning("%s cannot go on: %s", batch["id"], error)
            raise InputError(
                "What was answered of this batch cannot be gone on with: it is damaged, or the server's "
                "model or settings are others than when it began. Ask for a new batch."
            ) from error
        assert isinstance(journal, Journal), "a model that is divided over ranks cannot serve"
        return journal

    async def _answer(
        self, batch: Json, parsed: BatchFile, journal: Journal, cancelled: asyncio.Event
    ) -> None:
        lines = [self._checked(line, batch["endpoint"]) for line in parsed.lines]
        left = [line for line in lines if line.custom_id not in journal.answered]
        bad = [line for line in left if isinstance(line, BadLine)]
        await asyncio.to_thread(journal.append, [error_line(line) for line in bad])
        before = await asyncio.to_thread(counted, self._journal(batch))
        counts = {"total": len(lines), **before}
        self._note(batch, status="in_progress", in_progress_at=int(time.time()), request_counts=counts)
        waiting = iter([line for line in left if isinstance(line, BatchRequest)])
        finished: asyncio.Queue[tuple[BatchRequest, Ask] | None] = asyncio.Queue()
        running: dict[str, Ask] = {}
        watching = asyncio.create_task(_say_when(cancelled, finished))
        try:
            self._fill(waiting, running, finished)
            while running and not cancelled.is_set():
                ended = [await finished.get()]
                while not finished.empty():
                    ended.append(finished.get_nowait())
                answers = []
                for one in (each for each in ended if each is not None):
                    asked, ask = one
                    del running[asked.custom_id]
                    ask.done.result()  # raises what went wrong
                    answers.append(self._line(asked, ask, created=parsed.created))
                self._fill(waiting, running, finished)
                await asyncio.to_thread(journal.append, answers)
                batch["request_counts"] = counts | {"completed": counts["completed"] + len(answers)}
                counts = batch["request_counts"]
        finally:
            watching.cancel()
            for ask in running.values():
                self._crew.drop(ask)

    def _fill(
        self,
        waiting: Iterator[BatchRequest],
        running: dict[str, Ask],
        finished: "asyncio.Queue[tuple[BatchRequest, Ask] | None]",
    ) -> None:
        """Keep as many under way as fill the slots twice, so that none is idle while answers are written."""
        while sum(len(ask.sequences) for ask in running.values()) < 2 * self._crew.slots:
            asked = next(waiting, None)
            if asked is None:
                return
            ask = self._crew.ask([asked.request], in_a_hurry=False)
            running[asked.custom_id] = ask
            ask.done.add_done_callback(partial(_put, finished, (asked, ask)))

    def _checked(self, line: BatchRequest | BadLine, endpoint: str) -> BatchRequest | BadLine:
        """A line that this server cannot answer becomes a bad one."""
        if isinstance(line, BadLine):
            return line
        if line.model not in (None, self._name):
            there = f"there is no model {line.model!r} here; this server has {self._name!r}"
            return BadLine(line.custom_id, f"{line.custom_id}: {there}")
        if line.is_chat != (endpoint == CHAT):
            return BadLine(line.custom_id, f"{line.custom_id}: it is no request for {endpoint}")
        try:
            require_room(len(line.request.prompt), line.request.max_tokens, self._limits)
        except Refused as refused:
            return BadLine(line.custom_id, f"{line.custom_id}: {refused.message}")
        return line

    def _line(self, asked: BatchRequest, ask: Ask, *, created: int) -> Json:
        (completion,) = ask.completions()
        return answer_line(asked, completion, self._crew.engine.model, created=created)

    def _finish(self, batch: Json, *, is_cancelled: bool) -> None:
        """Make the output files; doing it again after a crash makes the same ones."""
        journal = self._journal(batch)
        changes: Json = {"request_counts": batch["request_counts"] | counted(journal)}
        for field, is_wanted in (("output", True), ("error", False)):
            identity = batch[f"reserved_{field}_id"]
            with tempfile.TemporaryFile() as chosen:
                chosen.writelines(line for line in _lines(journal) if _is_answer(line) == is_wanted)
                if chosen.tell():
                    chosen.seek(0)
                    name = f"{batch['id']}_{field}.jsonl"
                    self._store.add(chosen, name=name, purpose="batch_output", identity=identity)
                    changes[f"{field}_file_id"] = identity
        status = "cancelled" if is_cancelled else "completed"
        self._note(batch, status=status, **changes, **{f"{status}_at": int(time.time())})
        journal.unlink(missing_ok=True)
        journal.with_name(journal.name + ".job").unlink(missing_ok=True)


def shown(batch: Json) -> Json:
    """A batch as clients see it."""
    return {name: value for name, value in batch.items() if name not in _PRIVATE}


def counted(journal: Path) -> dict[str, int]:
    """How many answers and how many bad lines a journal has."""
    good = [_is_answer(line) for line in _lines(journal)]
    return {"completed": sum(good), "failed": len(good) - sum(good)}


def _lines(journal: Path) -> Iterator[bytes]:
    if journal.exists():
        with journal.open("rb") as file:
            yield from file


def _is_answer(line: bytes) -> bool:
    return bool(json.loads(line)["response"]["status_code"] == 200)


def _put(finished: "asyncio.Queue[Any]", one: tuple[BatchRequest, Ask], _: object) -> None:
    finished.put_nowait(one)


async def _say_when(cancelled: asyncio.Event, finished: "asyncio.Queue[Any]") -> None:
    await cancelled.wait()
    finished.put_nowait(None)
