"""A job that others join while it runs: the same answers, no slot kept by those who are gone."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from capstan.generation import Engine, Request
from capstan.generation.runtime.arrivals import Arrivals, open_lengths
from capstan.generation.runtime.measured import Progress
from capstan.generation.runtime.sequences import Sequence

LONGEST, SLOTS = 40, 3


@pytest.fixture(scope="module", params=["one batch", "streamed weights"])
def engine(
    request: pytest.FixtureRequest, text_model: Path, open_engine: Callable[..., Engine]
) -> Iterator[Engine]:
    place = {"one batch": [], "streamed weights": ["weights=disk cache=host attention=host"]}[request.param]
    with open_engine(text_model, lengths=open_lengths(LONGEST, SLOTS), place=place) as engine:
        yield engine


def _requests(count: int) -> list[Request]:
    return [
        Request(
            prompt=[2 + (7 * index + 3 * at) % 60 for at in range(1 + (5 * index) % 29)],
            max_tokens=1 + (3 * index) % 11,
            temperature=0.8 if index % 2 else 0.0,
            seed=index,
            logprobs=2 if index % 3 == 0 else None,
            prompt_logprobs=1 if index % 5 == 0 else None,
            ignore_eos=True,
            id=str(index),
        )
        for index in range(count)
    ]


def test_what_arrives_while_others_run_is_answered_as_in_a_job_of_its_own(engine: Engine) -> None:
    requests = _requests(24)
    alone = {done.id: done for done in engine.generate(requests)}
    arrivals, waiting = Arrivals(), list(requests)

    def put_some(count: int) -> None:
        for _ in range(min(count, len(waiting))):
            arrivals.put(engine.sequences(waiting.pop(0)))

    def join(progress: Progress) -> None:
        put_some(progress.num_sweeps % 3)

    put_some(2)
    done: list[Sequence] = []
    for sequence in engine.answer(arrivals, on_progress=join):
        done.append(sequence)
        if not arrivals.num_waiting:
            put_some(1)
        if len(done) == len(requests):
            arrivals.close()
    assert sorted(sequence.request.id for sequence in done) == sorted(alone)
    for sequence in done:
        expected = alone[sequence.request.id]
        assert sequence.finished().tokens == expected.answers[0].tokens
        if sequence.request.prompt_logprobs is not None:
            assert expected.prompt_logprobs is not None
            assert [entry.token for entry in sequence.prompt_logprobs] == [
                entry.token for entry in expected.prompt_logprobs[1:] if entry is not None
            ]
    assert engine.trace is not None
    assert engine.trace.peak_bytes["device"] <= engine.plan.peak_bytes["device"]


def test_sequences_that_are_not_wanted_any_more_free_their_slots_for_those_who_wait(engine: Engine) -> None:
    arrivals = Arrivals()
    endless = [
        sequence
        for _ in range(SLOTS + 2)
        for sequence in engine.sequences(Request(prompt=[5, 6], max_tokens=LONGEST - 2, ignore_eos=True))
    ]
    arrivals.put(endless)
    (wanted,) = engine.sequences(Request(prompt=[7, 8, 9], max_tokens=2, ignore_eos=True))
    running: list[int] = []

    def drop(progress: Progress) -> None:
        running.append(progress.num_running)
        if progress.num_sweeps == 3:
            arrivals.put([wanted])
            for sequence in endless:
                sequence.is_wanted = False

    for sequence in engine.answer(arrivals, on_progress=drop):
        assert sequence is wanted
        arrivals.close()
    assert running[:3] == [SLOTS] * 3
    assert running[3] == 1
    assert wanted.finish_reason == "length"
    assert not any(sequence.finish_reason for sequence in endless)


def test_an_idle_job_waits_for_arrivals_and_ends_when_they_are_closed(engine: Engine) -> None:
    arrivals = Arrivals()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(lambda: [each.generated for each in engine.answer(arrivals)])
        (first,) = engine.sequences(Request(prompt=[5, 6, 7], max_tokens=3, ignore_eos=True))
        arrivals.put([first])
        while first.finish_reason is None:
            assert not job.done()
        (second,) = engine.sequences(Request(prompt=[9], max_tokens=2, ignore_eos=True))
        arrivals.put([second])
        while second.finish_reason is None:
            assert not job.done()
        arrivals.close()
        assert [len(tokens) for tokens in job.result(timeout=60)] == [3, 2]


def test_those_in_a_hurry_are_taken_before_those_who_came_earlier(engine: Engine) -> None:
    arrivals = Arrivals()
    patient = [engine.sequences(Request(prompt=[5 + at], max_tokens=1))[0] for at in range(3)]
    urgent = [engine.sequences(Request(prompt=[9 + at], max_tokens=1))[0] for at in range(2)]
    arrivals.put(patient, in_a_hurry=False)
    arrivals.put(urgent)
    patient[0].is_wanted = False
    assert [id(each) for each in arrivals.take(3, waits=True)] == [id(each) for each in [*urgent, patient[1]]]
    assert [id(each) for each in arrivals.take(3, waits=False)] == [id(patient[2])]
    arrivals.put(urgent)
    arrivals.close()
    assert arrivals.take(3, waits=True) == []


def test_those_in_a_hurry_get_the_slots_of_those_without_which_lose_nothing(engine: Engine) -> None:
    def asked(hurries: bool) -> list[Request]:
        own = {"max_tokens": 3} if hurries else {"max_tokens": 20, "logprobs": 1, "prompt_logprobs": 1}
        return [
            Request(
                prompt=[5 + index, 9, 30 + index][: 1 + index],
                temperature=0.8 * (index % 2),
                repetition_penalty=1.3,
                ignore_eos=True,
                id=f"{hurries} {index}",
                **own,
            )
            for index in range(SLOTS)
        ]

    alone = {done.id: done.answers[0] for done in engine.generate([*asked(True), *asked(False)])}
    scored = {done.id: done.prompt_logprobs for done in engine.generate(asked(False))}
    patient = [engine.sequences(request)[0] for request in asked(False)]
    urgent = [engine.sequences(request)[0] for request in asked(True)]
    arrivals = Arrivals()
    arrivals.put(patient, in_a_hurry=False)

    def hurry(progress: Progress) -> None:
        if progress.num_sweeps in (4, 5):  # some at once, and one more while the first are running
            arrivals.put(urgent[:2] if progress.num_sweeps == 4 else urgent[2:])

    ended: list[tuple[str, int]] = []
    sweeps = []
    for sequence in engine.answer(arrivals, on_progress=lambda each: (sweeps.append(each), hurry(each))[0]):
        ended.append((sequence.request.id, len(sweeps)))
        if len(ended) == 2 * SLOTS:
            arrivals.close()
    # Sweep 5 has the first token of those who came after sweep 4, and so on.
    assert ended[:SLOTS] == [("True 0", 7), ("True 1", 7), ("True 2", 8)]
    for sequence in [*patient, *urgent]:
        answer = alone[sequence.request.id]
        assert sequence.finished().tokens == answer.tokens
        if not sequence.in_a_hurry:
            assert answer.logprobs is not None
            assert [entry.token for entry in sequence.logprobs] == list(answer.tokens)
            wanted = [entry.token for entry in scored[sequence.request.id] or () if entry is not None]
            assert [entry.token for entry in sequence.prompt_logprobs] == wanted
    assert engine.trace is not None
    assert engine.trace.peak_bytes["device"] <= engine.plan.peak_bytes["device"]


def test_those_in_a_hurry_do_not_displace_each_other(engine: Engine) -> None:
    arrivals = Arrivals()
    first = [
        engine.sequences(Request(prompt=[5 + at], max_tokens=9, ignore_eos=True))[0] for at in range(SLOTS)
    ]
    (late,) = engine.sequences(Request(prompt=[9], max_tokens=1, ignore_eos=True))
    arrivals.put(first)

    def join(progress: Progress) -> None:
        if progress.num_sweeps == 2:
            arrivals.put([late])

    done = []
    for sequence in engine.answer(arrivals, on_progress=join):
        done.append(sequence)
        if len(done) == SLOTS + 1:
            arrivals.close()
    assert done[-1] is late
