"""What happens when memory, disks or callers give up in the middle of a job."""

import errno
import gc
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.errors import CapstanError, DoesNotFit
from capstan.generation import Engine, Request
from capstan.generation.planning.batching import Length
from capstan.generation.runtime import kv_cache, outcomes
from capstan.generation.runtime.kv_cache import KeyValueCache
from capstan.generation.runtime.measured import Progress
from capstan.models.meta_model import MetaModel
from capstan.storage import Checkpoint, DiskSlab

CACHE_ON_DISK = ["weights=device cache=disk attention=device"]
ALL_ON_DISK = ["weights=disk cache=disk attention=device activations=disk"]


class Trip:
    """Stands in for a function and raises at its n-th call; before and after that it is the function.

    `arm(None)` lets every call pass; `arm(n, lasting=True)` raises at the n-th call and at every later one.
    """

    def __init__(self, function: Callable[..., Any], error: Callable[[], BaseException]) -> None:
        self._function, self._error = function, error
        self.arm(None)

    def arm(self, trips_at: int | None, *, lasting: bool = False) -> None:
        self.num_calls, self._trips_at, self._lasting = 0, trips_at, lasting

    @property
    def has_tripped(self) -> bool:
        return self._trips_at is not None and self.num_calls >= self._trips_at

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.num_calls += 1
        if self.has_tripped and (self._lasting or self.num_calls == self._trips_at):
            raise self._error()
        return self._function(*args, **options)

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        return lambda *args, **options: self(instance, *args, **options)


def _out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _io_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def _open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def _lanes() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("capstan "))


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("piece", ["layer", "back", "front"])
@pytest.mark.parametrize("shape", [(2, 3), (5, 1), (1, 2)])
@pytest.mark.parametrize("place", ["weights=host cache=host activations=host", "weights=device cache=device"])
def test_when_memory_runs_out_the_job_goes_on_with_fewer_slots_and_the_same_answers(
    piece: str,
    shape: tuple[int, int],
    place: str,
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    force_shape: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trip = Trip(getattr(MetaModel, piece), _out_of_memory)
    monkeypatch.setattr(MetaModel, piece, trip)
    with start_engine("llama", place=[place]) as engine:
        force_shape(slots=shape[0], batches=shape[1])
        answers_of(engine, requests)  # the planner plays layers too, once for a block
        trip.arm(None)
        answers_of(engine, requests)
        num_calls = trip.num_calls
        for trips_at in sorted({1, 2, num_calls // 3, num_calls // 2, num_calls}):
            trip.arm(trips_at)
            assert answers_of(engine, requests) == expected("llama"), f"call {trips_at} of {num_calls}"
            assert trip.has_tripped
            before = min(len(requests), shape[0] * shape[1])
            (note,) = engine.trace.notes
            assert note.startswith(f"out of memory with {before} slots; went on with ")
            assert 1 <= int(note.rsplit(" ", 1)[1]) < before


def test_no_answer_is_lost_when_memory_runs_out_in_the_sweep_that_completed_it(
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    force_shape: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trip = Trip(MetaModel.back, _out_of_memory)
    monkeypatch.setattr(MetaModel, "back", trip)
    with start_engine("llama") as engine:
        force_shape(slots=1, batches=5)
        # The second of five batches ends in the second sweep (the longest prompt has two new tokens); each
        # batch makes its logits in turn.
        for trips_at in range(6, 11):
            trip.arm(trips_at)
            assert answers_of(engine, requests) == expected("llama")
            assert trip.has_tripped


def test_no_logprob_of_a_prompt_is_lost_or_doubled_when_memory_runs_out_among_them(
    start_engine: Callable[..., Engine], force_shape: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[1 + (7 * index + start) % 120 for index in range(30)] for start in range(4)]
    asked = [Request(prompt=text, max_tokens=2, prompt_logprobs=1) for text in texts]
    trip = Trip(MetaModel.back, _out_of_memory)
    monkeypatch.setattr(MetaModel, "back", trip)
    # So little memory that logits are made a few rows at a time, several times for a prompt.
    budgets = {"device": 1 << 20, "host": 4 << 20, "disk": 0}
    with start_engine(
        "llama", place=["weights=host"], budgets=budgets, lengths=[Length(prompt=30, new=2)] * 2
    ) as engine:
        force_shape(slots=1, batches=2)
        trip.arm(None)
        scores = engine.score(texts)
        assert trip.num_calls >= 3 * len(texts), "a prompt's logits come in several parts"
        completions = {each.id: each for each in engine.generate(asked)}
        for trips_at in (1, 2, 3, 5, 7, 8):
            trip.arm(trips_at)
            assert _nearly(engine.score(texts), scores)
            trip.arm(trips_at)
            again = {each.id: each for each in engine.generate(asked)}
            for name, completion in completions.items():
                counted = [entry.token for entry in again[name].prompt_logprobs[1:]]
                assert counted == [entry.token for entry in completion.prompt_logprobs[1:]]


def _nearly(scores: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Equal up to float32 in another block: see test_scores.py."""
    return all(
        list(one.logprobs) == pytest.approx(list(other.logprobs), abs=1e-4)
        for one, other in zip(scores, wanted, strict=True)
    )


def test_when_memory_runs_out_again_and_again_the_job_ends_saying_so(
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    force_shape: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trip = Trip(MetaModel.layer, _out_of_memory)
    monkeypatch.setattr(MetaModel, "layer", trip)
    with start_engine("llama") as engine:
        force_shape(slots=4, batches=1)
        trip.arm(1, lasting=True)
        with pytest.raises(
            DoesNotFit, match="cpu ran out of memory with a single sequence: .*--device-memory"
        ):
            answers_of(engine, requests)
        assert [note.split(" ")[-1] for note in engine.trace.notes] == ["2", "1"]
        trip.arm(None)
        assert answers_of(engine, requests) == expected("llama")


# --- disks -------------------------------------------------------------------------------------------------


def test_a_disk_too_full_for_the_scratch_file_is_told_and_the_engine_goes_on(
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trip = Trip(os.posix_fallocate, _no_space)
    monkeypatch.setattr(os, "posix_fallocate", trip)
    with start_engine("llama", place=CACHE_ON_DISK) as engine:
        before = _open_files(), _lanes()
        trip.arm(1, lasting=True)
        with pytest.raises(
            DoesNotFit, match=rf"{scratch} cannot hold a scratch file of [\d,]+ bytes: No space"
        ):
            answers_of(engine, requests)
        assert (_open_files(), _lanes()) == before
        assert list(scratch.iterdir()) == []
        trip.arm(1)  # a smaller scratch file does fit
        assert answers_of(engine, requests) == expected("llama")
        assert len(engine.trace.notes) == 1


@pytest.mark.parametrize("place", [CACHE_ON_DISK, ["weights=device cache=device activations=disk"]])
@pytest.mark.parametrize("trips_at", [1, 9])
def test_a_disk_that_fills_up_while_writing_ends_the_job_and_nothing_stays_behind(
    place: list[str],
    trips_at: int,
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trip = Trip(os.pwritev, _no_space)
    monkeypatch.setattr(os, "pwritev", trip)
    with start_engine("llama", place=place) as engine:
        assert answers_of(engine, requests) == expected("llama")
        before = _open_files(), _lanes()
        trip.arm(trips_at, lasting=True)
        with pytest.raises(DoesNotFit, match=r"Writing [\d,]+ bytes to the scratch file .* failed: No space"):
            answers_of(engine, requests)
        assert (_open_files(), _lanes()) == before
        assert list(scratch.iterdir()) == []
        trip.arm(None)
        assert answers_of(engine, requests) == expected("llama")


def test_a_disk_that_fails_while_cache_is_read_ends_the_job_and_the_next_one_works(
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trip = Trip(DiskSlab.read, _io_error)
    monkeypatch.setattr(DiskSlab, "read", trip)
    with start_engine("llama", place=CACHE_ON_DISK) as engine:
        assert answers_of(engine, requests) == expected("llama")
        before = _open_files(), _lanes()
        trip.arm(5)
        with pytest.raises(OSError, match="Input/output error"):
            answers_of(engine, requests)
        assert (_open_files(), _lanes()) == before
        trip.arm(None)
        assert answers_of(engine, requests) == expected("llama")


def test_a_disk_that_fails_while_weights_are_read_ends_the_job_and_a_new_engine_works(
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trip = Trip(Checkpoint.read, _io_error)
    monkeypatch.setattr(Checkpoint, "read", trip)
    before = _lanes()
    with start_engine("llama", place=["weights=disk cache=device"]) as engine:
        trip.arm(40)  # past the embedding's rows: in the lane that brings the layers
        with pytest.raises(OSError, match="Input/output error"):
            answers_of(engine, requests)
    assert _lanes() == before
    trip.arm(None)
    with start_engine("llama", place=["weights=disk cache=device"]) as engine:
        assert answers_of(engine, requests) == expected("llama")


@pytest.mark.parametrize("what", ["weights", "cache"])
def test_a_read_error_of_the_disk_says_which_file_it_was_and_what_to_do(
    what: str,
    requests: list[Request],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trip = Trip(os.preadv, _io_error)
    monkeypatch.setattr(os, "preadv", trip)
    place = ["weights=disk cache=device"] if what == "weights" else CACHE_ON_DISK
    with start_engine("llama", place=place) as engine:
        trip.arm(20)
        file = "model.safetensors" if what == "weights" else "the scratch file"
        with pytest.raises(CapstanError, match=f"{file}.*Input/output error"):
            answers_of(engine, requests)


def test_a_model_that_shrinks_while_it_is_open_is_noticed(
    requests: list[Request],
    family_config: Callable[..., Any],
    save_model: Callable[..., Path],
    open_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    folder = save_model(family_config("llama"))
    with open_engine(folder, place=["weights=disk cache=device"]) as engine:
        answers_of(engine, requests)
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(100_000)
        with pytest.raises(
            CapstanError,
            match=r"model\.safetensors ends at byte [\d,]+, .*truncated or was changed.* Copy it again",
        ):
            answers_of(engine, requests)


@pytest.mark.parametrize(("weight_bits", "place"), [(None, "weights=host"), (4, "weights=disk")])
def test_an_opening_that_fails_leaves_no_file_open_and_no_thread_behind(
    weight_bits: int | None,
    place: str,
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trip = Trip(Checkpoint.read, _io_error)
    monkeypatch.setattr(Checkpoint, "read", trip)
    before = _open_files(), _lanes()
    for trips_at in (1, 3):  # while the norms are read, and while the weights are
        trip.arm(trips_at)
        with pytest.raises(OSError, match="Input/output error"):
            open_engine(model_folder("llama"), weight_bits=weight_bits, place=[place])
        assert trip.has_tripped
    assert (_open_files(), _lanes()) == before


# --- callers -----------------------------------------------------------------------------------------------


def test_a_job_left_half_way_gives_everything_back_and_the_next_one_works(
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    force_shape: Callable[..., None],
) -> None:
    with start_engine("llama", place=ALL_ON_DISK) as engine:
        assert answers_of(engine, requests) == expected("llama")
        before = _open_files(), _lanes()
        force_shape(slots=1, batches=2)
        job = engine.generate(requests)
        next(job)
        assert _open_files() > before[0]
        job.close()
        assert (_open_files(), _lanes()) == before
        assert engine.trace is not None
        assert answers_of(engine, requests) == expected("llama")


def test_an_error_in_the_callers_own_progress_report_ends_the_job_and_the_next_one_works(
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    def report(progress: Progress) -> None:
        if progress.num_sweeps == 2:
            raise ZeroDivisionError("the caller's own")

    with start_engine("llama", place=ALL_ON_DISK) as engine:
        assert answers_of(engine, requests) == expected("llama")
        before = _open_files(), _lanes()
        with pytest.raises(ZeroDivisionError, match="the caller's own"):
            answers_of(engine, requests, on_progress=report)
        assert (_open_files(), _lanes()) == before
        assert answers_of(engine, requests) == expected("llama")


@pytest.mark.parametrize("between", ["a score", "another job", "a plan"])
def test_what_is_asked_between_two_completions_does_not_change_the_later_ones(
    between: str,
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    force_shape: Callable[..., None],
) -> None:
    with start_engine("llama", place=["weights=host cache=host"]) as engine:
        force_shape(slots=1, batches=2)
        answers = {}
        for completion in engine.generate(requests):
            answers[int(completion.id)] = list(completion.answers[0].tokens)
            if between == "a score":
                assert len(engine.score([[1, 2, 3]])[0].logprobs) == 2
            elif between == "another job":
                assert answers_of(engine, requests[:2]) == expected("llama")[:2]
            else:
                engine.plan_job([Length(prompt=40 + len(answers), new=3)])
    assert [answers[index] for index in range(len(requests))] == expected("llama")


def test_a_closed_engine_has_given_back_every_file_and_thread(
    requests: list[Request], start_engine: Callable[..., Engine], answers_of: Callable[..., list[list[int]]]
) -> None:
    before = _open_files(), _lanes()
    with start_engine("llama", place=ALL_ON_DISK) as engine:
        answers_of(engine, requests)
        assert (_open_files(), _lanes()) != before
    assert (_open_files(), _lanes()) == before


# --- batches that have stopped -----------------------------------------------------------------------------

OVER_DISK = "weights=disk cache=disk activations=device attention="
FAULTS: dict[str, tuple[object, str, str]] = {
    "layer": (MetaModel, "layer", OVER_DISK + "device"),
    "attention on the device": (KeyValueCache, "attend_on_device", OVER_DISK + "device"),
    "attention on the host": (kv_cache, "attend_on_host", OVER_DISK + "host:0.5,device:0.5"),
    "reading cache": (DiskSlab, "read", OVER_DISK + "host:0.5,device:0.5"),
    "writing cache": (DiskSlab, "write", OVER_DISK + "host"),
    "reading weights": (Checkpoint, "read", OVER_DISK + "host:0.5,device:0.5"),
    "logits": (outcomes, "choose", OVER_DISK + "host:0.5,device:0.5"),
}


def _is_stripped(engine: Engine) -> bool:
    return all(
        parameter.is_meta for layer in engine.model.meta_model.layers for parameter in layer.parameters()
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_while_batches_are_stopped_ends_the_job_and_the_next_one_works(
    fault: str,
    stops: list[int],
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
    force_shape: Callable[..., None],
    force_ring: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, place = FAULTS[fault]
    trip = Trip(getattr(owner, name), _io_error)
    monkeypatch.setattr(owner, name, trip)
    force_ring(3)
    with start_engine("llama", place=[place]) as engine:
        force_shape(slots=1, batches=4)
        answers_of(engine, requests)  # the planner plays layers too, once for a block
        trip.arm(None)
        assert answers_of(engine, requests) == expected("llama")
        num_calls = trip.num_calls
        before = _open_files(), _lanes()
        for trips_at in (num_calls // 3, num_calls - 1):
            trip.arm(trips_at)
            with pytest.raises(OSError, match="Input/output error"):
                answers_of(engine, requests)
            assert _is_stripped(engine)
            assert (_open_files(), _lanes()) == before
            trip.arm(None)
            assert answers_of(engine, requests) == expected("llama"), f"after call {trips_at} of {num_calls}"
            check_promises(engine)
    assert max(stops) > 1


@pytest.mark.usefixtures("stops")
def test_a_job_left_half_way_leaves_no_stopped_batch_behind(
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    force_shape: Callable[..., None],
) -> None:
    with start_engine("llama", place=[OVER_DISK + "host:0.5,device:0.5"]) as engine:
        assert answers_of(engine, requests) == expected("llama")
        before = _open_files(), _lanes()
        force_shape(slots=1, batches=3)
        for num_taken in (1, 2, 4):
            left = engine.generate(requests)
            for _ in range(num_taken):
                next(left)
            left.close()
            assert _is_stripped(engine)
            assert (_open_files(), _lanes()) == before
            assert answers_of(engine, requests) == expected("llama")
