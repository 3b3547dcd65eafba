"""What an answer depends on, when it ends, and what is handed back with it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capstan.errors import UsageError
from capstan.generation import Completion, Engine, Request
from capstan.generation.runtime.measured import Progress

MIXED = "weights=device:0.3,host:0.4,disk:0.3 cache=device:0.34,host:0.33,disk:0.33 activations=host"
PROMPTS = ("a small crew", "the rope", "one hand", "round and round the sea")


@pytest.fixture(scope="module")
def engine(text_model: Path, open_engine: Callable[..., Engine]) -> Iterator[Engine]:
    with open_engine(text_model) as engine:
        yield engine


@pytest.fixture
def ending_early(engine: Engine, text_model: Path, tmp_path: Path) -> tuple[Path, int]:
    """The model with another end-of-sequence token beside its own: one that it soon generates, but not as
    its first. Comes with that token."""
    (answer,) = _tokens(engine, [Request(prompt=PROMPTS[3], max_tokens=8)]).values()
    token = next(token for token in answer if token != answer[0])
    folder = shutil.copytree(text_model, tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, token]}))
    return folder, token


def _done(engine: Engine, requests: list[Request], **settings: Any) -> dict[str, Completion]:
    return {completion.id: completion for completion in engine.generate(requests, **settings)}


def _tokens(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {
        (name, index): answer.tokens
        for name, completion in _done(engine, requests).items()
        for index, answer in enumerate(completion.answers)
    }


def _sampled(**settings: Any) -> list[Request]:
    return [
        Request(prompt=prompt, max_tokens=6 + index, temperature=0.9, seed=index, n=2, id=prompt, **settings)
        for index, prompt in enumerate(PROMPTS)
    ]


# --- chance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 2), (3, 1)])
def test_the_same_seed_gives_the_same_answer_in_every_block(
    shape: tuple[int, int], engine: Engine, force_shape: Callable[..., None]
) -> None:
    requests = _sampled(top_p=0.95)
    wanted = _tokens(engine, requests)
    force_shape(slots=shape[0], batches=shape[1])
    assert _tokens(engine, requests) == wanted


def test_the_same_seed_gives_the_same_answer_wherever_things_lie(
    engine: Engine, text_model: Path, open_engine: Callable[..., Engine]
) -> None:
    requests = _sampled(top_k=40)
    with open_engine(text_model, place=[MIXED]) as other:
        assert _tokens(other, requests) == _tokens(engine, requests)


def test_an_answer_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    together = _tokens(engine, _sampled())
    for request in _sampled():
        alone = _tokens(engine, [request])
        assert alone == {key: together[key] for key in alone}


def test_several_answers_to_one_request_differ_and_so_do_other_seeds(engine: Engine) -> None:
    asked = [
        Request(prompt=PROMPTS[0], max_tokens=12, temperature=1.0, seed=seed, n=4, ignore_eos=True)
        for seed in (1, 2)
    ]
    # 12 nearly even choices among 96 tokens: that any two of eight answers agree is not to be expected.
    assert len(set(_tokens(engine, asked).values())) == 8


def test_answers_without_temperature_or_among_one_token_are_the_greedy_one(engine: Engine) -> None:
    plain = Request(prompt=PROMPTS[1], max_tokens=9)
    one_token = Request(prompt=PROMPTS[1], max_tokens=9, temperature=2.0, top_k=1, seed=5)
    several = Request(prompt=PROMPTS[1], max_tokens=9, n=3)
    assert len(set(_tokens(engine, [plain, one_token, several]).values())) == 1


# --- the end ---------------------------------------------------------------------------------------------


def test_an_end_of_sequence_token_ends_an_answer_and_is_not_in_its_text(
    ending_early: tuple[Path, int], engine: Engine, open_engine: Callable[..., Engine]
) -> None:
    folder, token = ending_early
    asked = [
        Request(prompt=PROMPTS[3], max_tokens=8),
        Request(prompt=PROMPTS[3], max_tokens=8, ignore_eos=True),
        Request(prompt=PROMPTS[3], max_tokens=1),
    ]
    unhindered = _done(engine, asked[1:2])["0"].answers[0].tokens
    with open_engine(folder) as other:
        stopped, ignoring, short = (_done(other, asked)[str(index)].answers[0] for index in range(3))
    assert stopped.tokens == unhindered[: unhindered.index(token) + 1]
    assert (stopped.finish_reason, ignoring.finish_reason, short.finish_reason) == (
        "stop",
        "length",
        "length",
    )
    assert ignoring.tokens == unhindered
    assert short.tokens == unhindered[:1]


@pytest.mark.parametrize("where", ["at the very start", "inside a token", "over several tokens", "never"])
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(where: str, engine: Engine) -> None:
    free = Request(prompt=PROMPTS[0], max_tokens=20, ignore_eos=True)
    answer = _done(engine, [free])["0"].answers[0]
    text, decode = answer.text, engine.model.tokenizer.decode
    first, two = decode(answer.tokens[:1]), decode(answer.tokens[:9])
    stops = {
        "at the very start": (text[:3],),
        "inside a token": (next(letter for letter in text if letter not in first),),
        "over several tokens": ("no such text", two[len(decode(answer.tokens[:7])) - 1 :]),
        "never": ("no such text",),
    }[where]
    stopped = _done(engine, [Request(prompt=PROMPTS[0], max_tokens=20, ignore_eos=True, stop=stops)])
    found = stopped["0"].answers[0]
    place = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    assert found.text == text[:place]
    assert found.finish_reason == ("length" if where == "never" else "stop")
    assert found.tokens == answer.tokens[: len(found.tokens)]
    if where != "never":
        assert any(stop in decode(found.tokens) for stop in stops)
        assert not any(stop in decode(found.tokens[:-1]) for stop in stops)


def test_sequences_that_end_early_free_their_slots_for_the_waiting(
    ending_early: tuple[Path, int], open_engine: Callable[..., Engine], force_shape: Callable[..., None]
) -> None:
    folder, _ = ending_early
    seen: list[Progress] = []
    asked = [Request(prompt=PROMPTS[3], max_tokens=30) for _ in range(4)]
    with open_engine(folder) as engine:
        force_shape(slots=1, batches=1)
        done = _done(engine, asked, on_progress=seen.append)
    lengths = [len(completion.answers[0].tokens) for completion in done.values()]
    assert max(lengths) < 30
    # With one slot, every sweep makes one token. Had slots been kept to the end, there would be 120 sweeps.
    assert seen[-1].num_sweeps == len(seen) == sum(lengths)


def test_progress_counts_up_to_everything_done(engine: Engine, force_shape: Callable[..., None]) -> None:
    force_shape(slots=2, batches=1)
    seen: list[Progress] = []
    asked = [Request(prompt=PROMPTS[0], max_tokens=count, ignore_eos=True) for count in (2, 5, 3)]
    _done(engine, asked, on_progress=seen.append)
    assert [each.num_sweeps for each in seen] == list(range(1, len(seen) + 1))
    assert [each.num_finished for each in seen] == sorted(each.num_finished for each in seen)
    last = seen[-1]
    assert (last.num_sequences, last.num_finished, last.num_generated, last.num_running) == (3, 3, 10, 0)


# --- what comes back -------------------------------------------------------------------------------------


def test_every_request_gets_one_completion_with_its_id_and_as_many_answers_as_asked(engine: Engine) -> None:
    asked = [
        Request(prompt=PROMPTS[0], max_tokens=2, id="mine", n=3, ignore_eos=True),
        Request(prompt=PROMPTS[1], max_tokens=4, ignore_eos=True),
        Request(prompt=PROMPTS[2], max_tokens=1, ignore_eos=True),
    ]
    completions = list(engine.generate(asked))
    assert sorted(completion.id for completion in completions) == ["1", "2", "mine"]
    done = {completion.id: completion for completion in completions}
    counts = {name: [len(answer.tokens) for answer in each.answers] for name, each in done.items()}
    assert counts == {"mine": [2, 2, 2], "1": [4], "2": [1]}
    assert done["1"].text == engine.model.tokenizer.decode(
        done["1"].answers[0].tokens, skip_special_tokens=True
    )


def test_text_is_tokenised_as_the_tokenizer_does_it_special_tokens_included(engine: Engine) -> None:
    tokens = engine.model.tokenizer(PROMPTS[0])["input_ids"]
    assert tokens[0] == 0
    done = _done(engine, [Request(prompt=PROMPTS[0], max_tokens=3), Request(prompt=tokens, max_tokens=3)])
    assert done["0"].prompt_tokens == done["1"].prompt_tokens == tuple(tokens)
    assert done["0"].answers == done["1"].answers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens of at least 1, not 0"),
        ({"temperature": -1.0}, "a temperature of at least 0, not -1.0"),
        ({"temperature": float("nan")}, "a temperature of at least 0, not nan"),
        ({"top_k": -1}, "top_k of at least 0, not -1"),
        ({"top_p": 0.0}, "top_p above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p above 0 and at most 1, not 1.1"),
        ({"n": 0}, "n from 1 to 128, not 0"),
        ({"stop": ("",)}, "stop texts that are not empty"),
        ({"logprobs": 101}, "logprobs from 0 to 100, not 101"),
        ({"prompt_logprobs": -1}, "prompt_logprobs from 0 to 100, not -1"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request(prompt="a", **settings)
