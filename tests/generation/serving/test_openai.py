"""The openai client, unchanged, gets what the engine itself answers."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from capstan.generation import Completion, Request

PROMPTS = ["a small crew", "the rope comes in", "round and round"]


def _alone(running: Any, **settings: Any) -> Completion:
    (done,) = running.engine.generate([Request(**settings)])
    return done


@pytest.fixture
def client(running: Any) -> openai.OpenAI:
    return running.openai()


def test_a_completion_is_the_engines_own(running: Any, client: openai.OpenAI) -> None:
    done = client.completions.create(model="crew", prompt=PROMPTS[0], max_tokens=9)
    expected = _alone(running, prompt=PROMPTS[0], max_tokens=9)
    assert done.choices[0].text == expected.text
    assert done.choices[0].finish_reason == "length"
    assert done.object == "text_completion"
    assert done.model == "crew"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(expected.prompt_tokens), 9)


def test_every_parameter_reaches_the_engine(running: Any, client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "seed": 5, "n": 3}
    done = client.completions.create(model="crew", prompt=PROMPTS[1], **settings)
    expected = _alone(running, prompt=PROMPTS[1], **settings)
    assert [choice.text for choice in done.choices] == [answer.text for answer in expected.answers]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert len({choice.text for choice in done.choices}) == 3

    stop = expected.answers[0].text[3:5]
    cut = client.completions.create(model="crew", prompt=PROMPTS[1], stop=[stop], **settings)
    assert cut.choices[0].text == expected.answers[0].text.split(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    more = {"top_k": 1, "ignore_eos": True}
    likeliest = client.completions.create(model="crew", prompt=PROMPTS[1], extra_body=more, **settings)
    assert likeliest.choices[0].text == _alone(running, prompt=PROMPTS[1], max_tokens=12).text


def test_penalties_bias_and_min_p_reach_the_engine(running: Any, client: openai.OpenAI) -> None:
    known: dict[str, Any] = {
        "presence_penalty": 1.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"9": 3, "5": -100},
    }
    extra = {"repetition_penalty": 1.4, "min_p": 0.1, "ignore_eos": True}
    settings: dict[str, Any] = {"prompt": PROMPTS[1], "max_tokens": 12, "temperature": 0.9, "seed": 5, "n": 2}
    done = client.completions.create(model="crew", extra_body=extra, **settings, **known)
    asked = settings | known | extra | {"logit_bias": {9: 3.0, 5: -100.0}}
    expected = [answer.text for answer in _alone(running, **asked).answers]
    assert [choice.text for choice in done.choices] == expected
    plain = [answer.text for answer in _alone(running, **settings, ignore_eos=True).answers]
    assert set(expected).isdisjoint(plain)


def test_every_event_of_a_stream_has_a_place_for_usage_where_it_is_wanted(running: Any) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS[0], "max_tokens": 3, "ignore_eos": True, "stream": True}

    def events(options: dict[str, Any] | None) -> list[dict[str, Any]]:
        with running.http() as client:
            text = client.post("/v1/completions", json=body | {"stream_options": options}).text
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    *before, last = events({"include_usage": True})
    assert len(before) >= 2
    assert all(event["usage"] is None and len(event["choices"]) == 1 for event in before)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    for options in (None, {"include_usage": False}):
        assert all("usage" not in event and event["choices"] for event in events(options))


def test_several_prompts_in_one_request_are_answered_in_their_order(
    running: Any, client: openai.OpenAI
) -> None:
    tokens = [list(_alone(running, prompt=prompt, max_tokens=1).prompt_tokens) for prompt in PROMPTS]
    expected = [
        answer.text
        for prompt in PROMPTS
        for answer in _alone(running, prompt=prompt, max_tokens=5, temperature=1.0, seed=3, n=2).answers
    ]
    for prompts in (PROMPTS, tokens):
        done = client.completions.create(
            model="crew",
            prompt=prompts,
            max_tokens=5,
            temperature=1.0,
            seed=3,
            n=2,  # type: ignore[arg-type]
        )
        assert [choice.text for choice in done.choices] == expected
        assert [choice.index for choice in done.choices] == list(range(6))
    assert done.usage is not None
    assert done.usage.prompt_tokens == sum(map(len, tokens))


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_echo_with_logprobs_scores_the_prompt(max_tokens: int, running: Any, client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="crew", prompt=PROMPTS[2], max_tokens=max_tokens, echo=True, logprobs=2
    )
    expected = _alone(
        running, prompt=PROMPTS[2], max_tokens=max(1, max_tokens), logprobs=2, prompt_logprobs=2
    )
    assert expected.prompt_logprobs is not None
    assert expected.answers[0].logprobs is not None
    scored = [*expected.prompt_logprobs[1:], *expected.answers[0].logprobs[:max_tokens]]
    found = done.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == [entry.logprob for entry in scored if entry is not None]
    assert found.tokens is not None
    assert len(found.tokens) == len(expected.prompt_tokens) + max_tokens
    assert done.usage is not None
    assert done.usage.completion_tokens == max_tokens
    assert done.choices[0].text.endswith(PROMPTS[2] + (expected.text if max_tokens else ""))
    scores = running.engine.score([PROMPTS[2]])[0].logprobs
    own = [entry.logprob for entry in expected.prompt_logprobs[1:] if entry is not None]
    # Two orders of summation in float32: a few units in the last place of logits of the order of 10.
    assert own == pytest.approx(scores, abs=1e-5)


def test_prompt_logprobs_come_under_that_name(running: Any, client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="crew", prompt=PROMPTS[0], max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    expected = _alone(running, prompt=PROMPTS[0], max_tokens=1, prompt_logprobs=1)
    found = done.choices[0].model_dump()["prompt_logprobs"]
    assert expected.prompt_logprobs is not None
    assert found[0] is None
    for entry, own in zip(found[1:], expected.prompt_logprobs[1:], strict=True):
        assert own is not None
        assert entry[str(own.token)]["logprob"] == own.logprob


def test_a_chat_goes_through_the_models_template(running: Any, client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="crew",
        messages=[{"role": "user", "content": "a small"}],
        max_completion_tokens=7,
        logprobs=True,
        top_logprobs=3,
    )
    (choice,) = done.choices
    expected = _alone(
        running,
        prompt=running.engine.model.tokenizer("a small crew ", add_special_tokens=False)["input_ids"],
        max_tokens=7,
        logprobs=3,
    )
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert expected.answers[0].logprobs is not None
    assert [entry.logprob for entry in choice.logprobs.content] == [
        entry.logprob for entry in expected.answers[0].logprobs
    ]
    assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)


def test_a_streamed_answer_is_the_whole_one_in_pieces(running: Any, client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "crew", "prompt": PROMPTS[:2], "max_tokens": 20, "n": 2, "seed": 3}
    settings |= {"temperature": 1.0, "logprobs": 1, "stop": ["ew", "q"]}
    whole = client.completions.create(**settings)
    texts, tokens, ends = [""] * 4, [0] * 4, [None] * 4
    usage = None
    pieces = 0
    for chunk in client.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert ends[choice.index] is None, "nothing comes after the end"
            texts[choice.index] += choice.text
            tokens[choice.index] += len(choice.logprobs.tokens) if choice.logprobs else 0
            ends[choice.index] = choice.finish_reason
            pieces += 1
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert tokens == [len(choice.logprobs.tokens) for choice in whole.choices]
    assert usage == whole.usage
    assert pieces > 12


def test_a_streamed_chat_begins_with_its_role(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": "crew",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "the rope"}]}],
        "max_tokens": 9,
    }
    whole = client.chat.completions.create(**settings)
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**settings, stream=True)]
    assert deltas[0].delta.role == "assistant"
    assert "".join(each.delta.content or "" for each in deltas) == whole.choices[0].message.content
    assert [each.finish_reason for each in deltas[-2:]] == [None, "length"]


def test_the_model_is_listed_with_its_room(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "crew"
    assert model.model_dump()["max_model_len"] == 96
    assert client.models.retrieve("crew").id == "crew"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_tokens_of_text_and_text_of_tokens(running: Any) -> None:
    with running.http() as client:
        found = client.post("/tokenize", json={"model": "crew", "prompt": PROMPTS[0]}).json()
        bare = client.post("/tokenize", json={"prompt": PROMPTS[0], "add_special_tokens": False}).json()
        chat = {"messages": [{"role": "user", "content": "a small"}]}
        assert (
            client.post("/tokenize", json=chat).json()["tokens"]
            == running.engine.model.tokenizer("a small crew ", add_special_tokens=False)["input_ids"]
        )
        called = client.post("/tokenize", json=chat | {"chat_template_kwargs": {"name": "crew "}}).json()
        assert (
            called["tokens"]
            == running.engine.model.tokenizer("crew a small crew ", add_special_tokens=False)["input_ids"]
        )
        assert client.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": PROMPTS[0]}
    assert found["tokens"] == list(_alone(running, prompt=PROMPTS[0], max_tokens=1).prompt_tokens)
    assert found["count"] == len(found["tokens"])
    assert bare["tokens"] == found["tokens"][1:]


def test_a_request_that_states_no_length_gets_what_there_is_room_for(client: openai.OpenAI) -> None:
    done = client.completions.create(model="crew", prompt=[5] * 90, extra_body={"ignore_eos": True})
    assert done.usage is not None
    assert done.usage.completion_tokens == 6


def test_a_streamed_echo_of_no_new_tokens_is_the_prompt_alone(running: Any, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="crew",
        prompt=PROMPTS[0],
        max_tokens=0,
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    *events, last = stream
    text = "".join(event.choices[0].text for event in events)
    assert (
        text
        == client.completions.create(model="crew", prompt=PROMPTS[0], max_tokens=0, echo=True).choices[0].text
    )
    assert text == PROMPTS[0]
    assert last.usage is not None
    assert last.usage.completion_tokens == 0


def test_a_prompt_beyond_the_context_says_so_by_its_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="crew", prompt=[5] * 3000, max_tokens=4)
    assert refused.value.code == "context_length_exceeded"


def test_the_end_of_an_answer_by_a_special_token_streams_as_it_comes_at_once(
    running: Any, client: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {
        "model": "crew",
        "prompt": PROMPTS[0],
        "max_tokens": 40,
        "temperature": 1.0,
        "seed": 5,
    }
    asked |= {"stop": ["</s>"], "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**asked).choices[0].text
    pieces = [event.choices[0].text for event in client.completions.create(stream=True, **asked)]
    assert "".join(pieces) == whole


def test_pages_of_named_origins_may_ask_and_others_may_not(serve: Callable[..., Any]) -> None:
    asking = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with serve(token="secret", allow_origins=("https://example.org",)) as running, running.http() as http:
        allowed = http.options("/v1/completions", headers=asking)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
        strange = http.options("/v1/completions", headers=asking | {"Origin": "https://else.org"})
        assert "access-control-allow-origin" not in strange.headers
        refused = http.get("/v1/models", headers={"Origin": "https://example.org"})
        assert refused.status_code == 401, "the token is wanted all the same"
