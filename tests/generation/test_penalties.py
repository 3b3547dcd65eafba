"""Penalties, bias and min-p through the engine: for each request, wherever things lie, whoever is beside."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.errors import InputError, UsageError
from capstan.generation import Engine, Request
from capstan.generation.runtime import job
from made_logits import adjusted, left_by

MIXED = "weights=device:0.3,host:0.4,disk:0.3 cache=device:0.34,host:0.33,disk:0.33 activations=host"
PLACES = {"on the device": "weights=device cache=device", "mixed": MIXED, "host": "weights=host cache=host"}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.8},
    {"presence_penalty": 2.0, "logit_bias": {3: 4.5}},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"logit_bias": {7: 100}},
    {"logit_bias": {5: -100, 9: 3.0}, "repetition_penalty": 0.6, "frequency_penalty": -1.0},
]


@pytest.fixture(scope="module", params=PLACES)
def engine(request: pytest.FixtureRequest, start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    with start_engine("llama", place=[PLACES[request.param]], share_prefixes=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def asked() -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    return [
        Request(
            prompt=torch.randint(1, 128, (4 + 3 * at,), generator=generator).tolist(),
            max_tokens=9 - at,
            ignore_eos=True,
            id=str(at),
            **settings,
        )
        for at, settings in enumerate(SETTINGS)
    ]


@torch.no_grad()
def by_definition(reference: Any, request: Request) -> list[int]:
    """The likeliest tokens by the definitions, the model's logits being those of transformers."""
    prompt, generated = list(request.prompt), []
    while len(generated) < request.max_tokens:
        logits = reference.model(torch.tensor([prompt + generated])).logits[0, -1].tolist()
        values = torch.tensor(adjusted(logits, prompt, generated, request), dtype=torch.float64)
        first, second = values.topk(2).values.tolist()
        assert first - second > 1e-4, "take other prompts: this one is a near tie"
        generated.append(int(values.argmax()))
    return generated


@pytest.fixture(scope="module")
def expected(
    asked: list[Request], model_folder: Callable[[str], Path], open_reference: Callable[[Path], Any]
) -> list[list[int]]:
    reference = open_reference(model_folder("llama"))
    answers = [by_definition(reference, request) for request in asked]
    plain = [
        by_definition(reference, Request(prompt=each.prompt, max_tokens=each.max_tokens)) for each in asked
    ]
    assert [answer != other for answer, other in zip(answers, plain, strict=True)] == [False] + [True] * 5
    return answers


@pytest.mark.usefixtures("block")
def test_mixed_requests_get_the_tokens_of_the_definition_within_the_memory_foreseen(
    engine: Engine,
    asked: list[Request],
    expected: list[list[int]],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    assert answers_of(engine, asked) == expected
    check_promises(engine)


def test_transformers_own_repetition_penalty_gives_the_same_tokens(
    asked: list[Request],
    expected: list[list[int]],
    model_folder: Callable[[str], Path],
    open_reference: Callable[[Path], Any],
) -> None:
    reference = open_reference(model_folder("llama"))
    assert reference.greedy(asked[1].prompt, asked[1].max_tokens, repetition_penalty=1.8) == expected[1]


def test_a_prefix_that_is_computed_once_is_penalised_as_part_of_each_prompt(
    engine: Engine,
    model_folder: Callable[[str], Path],
    open_reference: Callable[[Path], Any],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    prefix = [(7 * at) % 120 + 1 for at in range(20)]
    reference = open_reference(model_folder("llama"))
    shared = [
        Request(prompt=[*prefix, last], max_tokens=6, ignore_eos=True, **settings)
        for last, settings in zip((30, 31, 32), SETTINGS[:3], strict=True)
    ]
    assert answers_of(engine, shared) == [by_definition(reference, each) for each in shared]
    assert any(choice.name == "prefix" for choice in engine.plan.choices)
    check_promises(engine)


def test_steps_that_are_replayed_penalise_too(
    tapes: Any,
    start_engine: Callable[..., Engine],
    asked: list[Request],
    expected: list[list[int]],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    with start_engine("llama", place=["weights=device cache=device"]) as engine:
        assert answers_of(engine, asked) == expected
    assert tapes.replays > 0


def test_a_job_that_ran_out_of_memory_goes_on_with_the_same_counts(
    monkeypatch: pytest.MonkeyPatch,
    start_engine: Callable[..., Engine],
    asked: list[Request],
    expected: list[list[int]],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    calls = iter(range(1000))
    outcomes_of = job.outcomes_of

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return outcomes_of(*arguments, **options)

    monkeypatch.setattr(job, "outcomes_of", failing)
    with start_engine("llama") as engine:
        assert answers_of(engine, asked) == expected
        assert engine.trace is not None
        assert "out of memory" in engine.trace.notes[0]


def test_each_of_several_answers_counts_its_own_tokens(
    engine: Engine, model_folder: Callable[[str], Path], open_reference: Callable[[Path], Any]
) -> None:
    settings: dict[str, Any] = {"temperature": 1.2, "frequency_penalty": 2.0, "min_p": 0.02, "seed": 11}
    request = Request(prompt=[5, 9, 2], max_tokens=8, n=4, ignore_eos=True, **settings)
    (done,) = engine.generate([request])
    answers = [list(answer.tokens) for answer in done.answers]
    assert len(set(map(tuple, answers))) == 4
    reference = open_reference(model_folder("llama"))
    for answer in answers:
        for step, token in enumerate(answer):
            with torch.no_grad():
                logits = reference.model(torch.tensor([[5, 9, 2, *answer[:step]]])).logits[0, -1].tolist()
            assert left_by(adjusted(logits, [5, 9, 2], answer[:step], request), request)[token] > 0
    (one,) = engine.generate([replace(request, n=1)])
    assert list(one.answers[0].tokens) == answers[0]


def test_logprobs_are_those_of_the_model_before_penalties(
    engine: Engine, model_folder: Callable[[str], Path], open_reference: Callable[[Path], Any]
) -> None:
    request = Request(
        prompt=[5, 9, 2], max_tokens=4, logprobs=1, ignore_eos=True, logit_bias={7: 100}, presence_penalty=1.0
    )
    (done,) = engine.generate([request])
    entries = done.answers[0].logprobs
    assert entries is not None
    assert [entry.token for entry in entries] == [7] * 4
    wanted = open_reference(model_folder("llama")).logprobs([5, 9, 2, 7, 7, 7])[2:]
    # As in test_scores.py: sums of the same terms in another order.
    assert [entry.logprob for entry in entries] == pytest.approx(wanted[:, 7].tolist(), abs=1e-4)
    assert [entry.top[0][0] for entry in entries] == wanted.argmax(-1).tolist()


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"logit_bias has token ids outside 0 … 127"):
        list(engine.generate([Request(prompt=[1], logit_bias={128: 1.0})]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": -0.1}, "min_p from 0 to 1, not -0.1"),
        ({"min_p": 1.1}, "min_p from 0 to 1, not 1.1"),
        ({"min_p": float("nan")}, "min_p from 0 to 1, not nan"),
        ({"repetition_penalty": 0.0}, "a repetition_penalty above 0, not 0.0"),
        ({"repetition_penalty": -1.0}, "a repetition_penalty above 0, not -1.0"),
        ({"repetition_penalty": float("inf")}, "a repetition_penalty above 0, not inf"),
        ({"repetition_penalty": float("nan")}, "a repetition_penalty above 0, not nan"),
        ({"presence_penalty": 2.1}, "a presence_penalty from -2 to 2, not 2.1"),
        ({"frequency_penalty": -2.1}, "a frequency_penalty from -2 to 2, not -2.1"),
        ({"frequency_penalty": float("nan")}, "a frequency_penalty from -2 to 2, not nan"),
        ({"logit_bias": {5: 100.5}}, "a logit_bias from -100 to 100 for token 5, not 100.5"),
        ({"logit_bias": {5: float("nan")}}, "a logit_bias from -100 to 100 for token 5, not nan"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias for tokens of at least 0, not -1"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request(prompt="a", **settings)
