"""Lines of a batch file: what is understood, and what is refused in words."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capstan.generation.batch.ids import line_names
from capstan.generation.batch.lines import BadLine, BatchRequest, parse_lines

CONTEXT = 64
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
TEMPLATE = (
    "{% if mood %}<{{ mood }}>{% endif %}{% for each in documents or [] %}<{{ each.text }}>{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def model() -> Any:
    """What parsing needs of a model."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    meta_model = SimpleNamespace(vocabulary_size=256, max_positions=CONTEXT)
    return SimpleNamespace(folder=Path("models/tiny"), tokenizer=tokenizer, meta_model=meta_model)


@pytest.fixture(scope="module")
def parse(model: Any) -> Callable[..., Any]:
    """`parse(line)`: the outcome of the only line of a file, of text or an object."""

    def parse(line: Any, *, max_tokens: int = 16) -> BatchRequest | BadLine:
        text = line if isinstance(line, str) else json.dumps(line)
        (outcome,) = parse_lines([text], model, max_tokens=max_tokens)
        return outcome

    return parse


@pytest.fixture(scope="module")
def accept(parse: Callable[..., Any]) -> Callable[..., BatchRequest]:
    """`accept(prompt="hi")`: the request that a plain line becomes."""

    def accept(*, max_tokens_flag: int = 16, **body: Any) -> BatchRequest:
        outcome = parse(body, max_tokens=max_tokens_flag)
        assert isinstance(outcome, BatchRequest), outcome
        return outcome

    return accept


@pytest.fixture(scope="module")
def refuse(parse: Callable[..., Any]) -> Callable[..., str]:
    """`refuse(line)`: the reason why a line cannot be answered."""

    def refuse(line: Any) -> str:
        outcome = parse(line)
        assert isinstance(outcome, BadLine), outcome
        assert outcome.reason.startswith("line 1: ")
        return outcome.reason

    return refuse


# --- what is understood -----------------------------------------------------------------------------------


def test_a_plain_line(accept: Callable[..., BatchRequest], model: Any) -> None:
    asked = accept(prompt="hello")
    assert (asked.custom_id, asked.is_chat, asked.echo) == ("line-1", False, False)
    request = asked.request
    assert request.id == "line-1"
    assert model.tokenizer.decode(request.prompt) == "hello"
    assert (request.temperature, request.top_k, request.top_p, request.seed, request.n) == (
        0.0,
        0,
        1.0,
        None,
        1,
    )
    assert (request.stop, request.logprobs, request.prompt_logprobs) == ((), None, None)
    assert not request.ignore_eos


def test_a_plain_line_may_have_a_custom_id(accept: Callable[..., BatchRequest]) -> None:
    assert accept(prompt="x", custom_id="mine").custom_id == "mine"


def test_an_openai_line(parse: Callable[..., Any]) -> None:
    body = {"prompt": "hello", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 11}
    outcome = parse({"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": body})
    assert isinstance(outcome, BatchRequest)
    request = outcome.request
    assert (request.id, request.max_tokens, request.seed) == ("a", 7, 11)
    assert (request.temperature, request.top_p, request.top_k) == (0.5, 0.9, 3)


def test_token_ids_are_a_prompt(accept: Callable[..., BatchRequest]) -> None:
    assert accept(prompt=[5, 0, 255]).request.prompt == [5, 0, 255]


def test_max_tokens_is_of_the_line_or_else_of_the_flag(accept: Callable[..., BatchRequest]) -> None:
    assert accept(prompt="x", max_tokens_flag=9).request.max_tokens == 9
    assert accept(prompt="x", max_tokens=3, max_tokens_flag=9).request.max_tokens == 3
    assert accept(prompt="x", max_tokens=None, max_tokens_flag=9).request.max_tokens == 9


def test_chat_has_a_newer_name_for_max_tokens(accept: Callable[..., BatchRequest]) -> None:
    assert accept(messages=[USER], max_completion_tokens=4).request.max_tokens == 4
    assert accept(messages=[USER], max_completion_tokens=4, max_tokens=5).request.max_tokens == 4
    assert accept(messages=[USER], max_tokens=5).request.max_tokens == 5


def test_stop_is_one_text_or_several(accept: Callable[..., BatchRequest]) -> None:
    assert accept(prompt="x", stop="\n").request.stop == ("\n",)
    assert accept(prompt="x", stop=["a", "b"]).request.stop == ("a", "b")
    assert accept(prompt="x", stop=[]).request.stop == ()
    assert accept(prompt="x", stop=None).request.stop == ()


def test_numbers_of_answers_seeds_and_ends(accept: Callable[..., BatchRequest]) -> None:
    request = accept(prompt="x", n=3, seed=-1, ignore_eos=True, top_k=-1).request
    assert (request.n, request.seed, request.ignore_eos) == (3, -1, True)
    assert request.top_k == 0, "other engines write -1 for all"


@pytest.mark.parametrize(
    ("written", "expected"), [(None, None), (False, None), (True, 1), (0, 0), (1, 1), (5, 5)]
)
def test_logprobs_of_completions_are_a_number(
    written: Any, expected: int | None, accept: Callable[..., BatchRequest]
) -> None:
    assert accept(prompt="x", logprobs=written).request.logprobs == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ],
)
def test_logprobs_of_chats_are_a_switch_and_a_number(
    written: dict[str, Any], expected: int | None, accept: Callable[..., BatchRequest]
) -> None:
    assert accept(messages=[USER], **written).request.logprobs == expected


def test_echo_asks_for_the_prompts_logprobs_where_those_of_the_answer_are_asked_for(
    accept: Callable[..., BatchRequest],
) -> None:
    def asked(**body: Any) -> tuple[bool, int | None, int | None]:
        outcome = accept(prompt="x", **body)
        return outcome.echo, outcome.request.logprobs, outcome.request.prompt_logprobs

    assert asked(echo=True) == (True, None, None)
    assert asked(echo=True, logprobs=0) == (True, 0, 0)
    assert asked(echo=True, logprobs=3) == (True, 3, 3)
    assert asked(echo=False, logprobs=3) == (False, 3, None)
    assert asked(prompt_logprobs=2) == (False, None, 2)


def test_messages_become_a_prompt_by_the_models_template(
    accept: Callable[..., BatchRequest], model: Any
) -> None:
    asked = accept(messages=[{"role": "system", "content": "be brief"}, USER])
    assert asked.is_chat
    assert model.tokenizer.decode(asked.request.prompt) == "<system>be brief<user>hi<assistant>"


def test_text_parts_are_joined_as_they_are(accept: Callable[..., BatchRequest], model: Any) -> None:
    parts = [{"type": "text", "text": "to be "}, {"type": "text", "text": "or not"}]
    asked = accept(messages=[{"role": "user", "content": parts}, {"role": "user", "content": []}])
    assert model.tokenizer.decode(asked.request.prompt) == "<user>to be or not<user><assistant>"


def test_what_changes_nothing_may_be_said(accept: Callable[..., BatchRequest]) -> None:
    accept(
        prompt="x",
        model="gpt-4",
        user="me",
        metadata={"a": "b"},
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        best_of=1,
        stream=False,
        suffix=None,
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
    )
    assert accept(prompt="x", best_of=3, n=3).request == accept(prompt="x", n=3).request
    nothing = dict.fromkeys(
        (
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "stream_options",
            "parallel_tool_calls",
            "reasoning_effort",
        )
    )
    asked = accept(prompt="x", chat_template_kwargs={}, **nothing).request
    assert asked == accept(prompt="x").request
    assert not asked.has_penalties


def test_penalties_bias_and_min_p_are_read_as_they_are_written(accept: Callable[..., BatchRequest]) -> None:
    asked = accept(
        prompt="x",
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={"0": -100, "255": 2.5},
    ).request
    assert (asked.min_p, asked.repetition_penalty) == (0.25, 1.5)
    assert (asked.presence_penalty, asked.frequency_penalty) == (-2.0, 2.0)
    assert asked.logit_bias == {0: -100.0, 255: 2.5}


def test_a_chat_template_gets_the_variables_that_a_request_states(
    accept: Callable[..., BatchRequest], model: Any
) -> None:
    asked = accept(messages=[USER], chat_template_kwargs={"mood": "calm", "documents": [{"text": "facts"}]})
    assert model.tokenizer.decode(asked.request.prompt) == "<calm><facts><user>hi<assistant>"


def test_lines_without_text_are_passed_over_and_counted(model: Any) -> None:
    lines = ["", '{"prompt": "a"}', "  ", "\t\r", '{"prompt": "b"}\r', ""]
    assert [outcome.custom_id for outcome in parse_lines(lines, model, max_tokens=4)] == ["line-2", "line-5"]


# --- what is refused --------------------------------------------------------------------------------------


TEXT = {"type": "text", "text": "hi"}


def spoken(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": parts}]}


def openai(**changes: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "x"}} | changes


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "x"', "delimiter"),
        ("prompt: x", "Expecting value"),
        ("[1, 2]", "a JSON object was wanted, not list"),
        ('"x"', "not str"),
        ("{}", "either 'prompt' or 'messages'"),
        ({"max_tokens": 3}, "either 'prompt' or 'messages'"),
        ({"prompt": "x", "messages": [USER]}, "either 'prompt' or 'messages'"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [256]}, "outside 0 … 255"),
        ({"prompt": [-1]}, "outside 0 … 255"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": 7}, "prompt"),
        (
            {"prompt": "x" * 49, "max_tokens": 16},
            "49 tokens and 16 new ones exceed the model's context of 64",
        ),
        ({"prompt": "x", "max_tokens": 64}, "1 tokens and 64 new ones"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens of at least 1"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "3"}, "max_tokens"),
        ({"prompt": "x", "temperature": -0.1}, "temperature of at least 0"),
        ({"prompt": "x", "temperature": "warm"}, "temperature"),
        ('{"prompt": "x", "temperature": NaN}', "temperature"),
        ('{"prompt": "x", "temperature": Infinity}', "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p above 0"),
        ({"prompt": "x", "top_p": 1.1}, "top_p above 0 and at most 1"),
        ({"prompt": "x", "n": 0}, "n from 1"),
        ({"prompt": "x", "n": 1000}, "n from 1 to 128"),
        ({"prompt": "x", "stop": ""}, "stop texts that are not empty"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop texts that are not empty"),
        ({"prompt": "x", "stop": [3]}, "stop"),
        ({"prompt": "x", "logprobs": -1}, "logprobs from 0"),
        ({"prompt": "x", "prompt_logprobs": 101}, "prompt_logprobs from 0 to 100"),
        ({"prompt": "x", "echo": "yes"}, "echo"),
        ({"prompt": "x", "temprature": 1}, "'temprature' is not a parameter"),
        ({"prompt": "x", "presence_penalty": 2.5}, "presence_penalty from -2 to 2, not 2.5"),
        ({"prompt": "x", "frequency_penalty": -3}, "frequency_penalty from -2 to 2, not -3"),
        ({"prompt": "x", "frequency_penalty": "1"}, "frequency_penalty: Input should be a valid number"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty above 0, not 0"),
        ('{"prompt": "x", "repetition_penalty": Infinity}', "repetition_penalty above 0, not inf"),
        ({"prompt": "x", "min_p": 1.5}, "min_p from 0 to 1, not 1.5"),
        ({"prompt": "x", "min_p": True}, "min_p: Input should be a valid number"),
        ({"prompt": "x", "temperature": "0.5"}, "temperature: Input should be a valid number"),
        ({"prompt": "x", "temperature": True}, "temperature: Input should be a valid number"),
        ({"prompt": "x", "top_p": "1"}, "top_p: Input should be a valid number"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias from -100 to 100 for token 5, not 101"),
        ('{"prompt": "x", "logit_bias": {"5": NaN}}', "logit_bias from -100 to 100 for token 5, not nan"),
        ({"prompt": "x", "logit_bias": {"256": 1}}, "logit_bias has token ids outside 0 … 255"),
        *[
            ({"prompt": "x", "logit_bias": {name: 1}}, f"logit_bias: {name!r} is not a token id")
            for name in ("hi", "-1", "5.0", " 5", "05", "1_0", "٣", "", "9" * 5000)
        ],
        ({"prompt": "x", "logit_bias": {"5": "1"}}, "logit_bias.5: Input should be a valid number"),
        ({"prompt": "x", "logit_bias": [5]}, "logit_bias: Input should be a valid dictionary"),
        ({"prompt": "x", "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' is for chats"),
        ({"messages": [USER], "chat_template_kwargs": "a"}, "chat_template_kwargs: Input should be"),
        ({"messages": [USER], "chat_template_kwargs": {"messages": []}}, "refuses these messages"),
        *[
            (
                {"messages": [USER], "chat_template_kwargs": {name: True}},
                f"chat_template_kwargs: {name!r} is no variable",
            )
            for name in ("tokenize", "add_generation_prompt", "chat_template", "conversation", "return_dict")
        ],
        ({"messages": [USER], "tool_choice": "auto"}, "tool_choice='auto'"),
        ({"messages": [USER], "parallel_tool_calls": False}, "parallel_tool_calls=False"),
        ({"messages": [USER], "reasoning_effort": "low"}, "reasoning_effort='low'"),
        (
            {"prompt": "x", "stream_options": {"include_usage": True}},
            "stream_options={'include_usage': True}",
        ),
        ({"prompt": "x", "best_of": True}, "best_of: Input should be a valid integer"),
        ({"prompt": "x", "best_of": 1, "n": 2}, "best_of=1 is not n=2"),
        ({"prompt": "x", "stream": 0}, "stream=0"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens of at least 1, not 0"),
        ({"prompt": "x", "max_tokens": False, "echo": True}, "max_tokens: Input should be a valid integer"),
        ({"messages": [USER], "max_tokens": 0, "echo": True}, "max_tokens of at least 1, not 0"),
        ({"prompt": "x", "stream": True}, "stream=True"),
        ({"prompt": "x", "best_of": 2}, "best_of=2"),
        ({"prompt": "x", "suffix": "y"}, "suffix='y'"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "no robots"),
        ({"messages": []}, "empty conversation"),
        (spoken(TEXT, {"type": "image_url", "image_url": {}}), "message 1, part 2: 'image_url' is not text"),
        (spoken({"type": "text"}), "message 1, part 1: 'text' is not text that can be read"),
        (spoken({"type": "text", "text": 5}), "message 1, part 1: 'text' is not text that can be read"),
        (spoken("hi"), "message 1, part 1: 'hi' is not text"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [USER], "top_logprobs": 4}, "'top_logprobs' needs 'logprobs': true"),
        ({"messages": [USER], "logprobs": False, "top_logprobs": 4}, "'top_logprobs' needs 'logprobs': true"),
        ({"prompt": "x", "logprobs": 2, "top_logprobs": 2}, "'top_logprobs' is for chats"),
        ({"prompt": ["x", "y"]}, "prompt: Input should be text or a list of token ids"),
        ({"prompt": "half \ud83d"}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "half \ud83d"}]}, "half of a surrogate pair"),
        ({"custom_id": "a", "method": "POST", "url": COMPLETIONS}, "body: Field required"),
        (openai(url=CHAT), "url: /v1/chat/completions takes 'messages', but the body has 'prompt'"),
        (
            openai(body={"messages": [USER]}),
            "takes 'prompt', but the body has 'messages'",
        ),
        (openai(url="/v1/embeddings"), "url"),
        (openai(method="GET"), "method"),
        (openai(body="x"), "body"),
        (openai(body={}), "either 'prompt' or 'messages'"),
        (openai(custom_id=""), "custom_id"),
        (openai(custom_id=5), "custom_id"),
        (openai(priority=1), "priority"),
        ({"body": {"prompt": "x"}}, "custom_id"),
    ],
)
def test_what_is_wrong_is_named(line: Any, named: str, refuse: Callable[..., str]) -> None:
    assert named in refuse(line)


def test_a_bad_line_keeps_its_custom_id_where_it_has_one(parse: Callable[..., Any]) -> None:
    assert parse(openai(body={"prompt": ""})).custom_id == "a"
    assert parse({"custom_id": "b"}).custom_id == "b"
    assert parse("{").custom_id == "line-1"


def test_without_a_chat_template_messages_are_refused(model: Any) -> None:
    plain = SimpleNamespace(folder=model.folder, meta_model=model.meta_model, tokenizer=byte_tokenizer())
    lines = [json.dumps({"messages": [USER]}), json.dumps({"prompt": "x"})]
    bad, good = parse_lines(lines, plain, max_tokens=4)
    assert isinstance(bad, BadLine)
    assert "tiny has no chat template" in bad.reason
    assert isinstance(good, BatchRequest)


def test_without_a_tokenizer_only_token_ids_are_understood(model: Any) -> None:
    plain = SimpleNamespace(folder=model.folder, meta_model=model.meta_model, tokenizer=None)
    lines = ['{"prompt": "x"}', json.dumps({"messages": [USER]}), '{"prompt": [1]}']
    text, chat, tokens = parse_lines(lines, plain, max_tokens=4)
    assert isinstance(text, BadLine)
    assert "has no tokenizer" in text.reason
    assert isinstance(chat, BadLine)
    assert isinstance(tokens, BatchRequest)


def test_a_custom_id_that_is_used_twice_is_answered_once(model: Any) -> None:
    lines = [
        '{"custom_id": "a", "prompt": "first"}',
        '{"custom_id": "a", "prompt": "second"}',
        '{"custom_id": "a", "prompt": "third"}',
        '{"custom_id": "b", "prompt": "fourth"}',
    ]
    first, second, third, fourth = parse_lines(lines, model, max_tokens=4)
    assert isinstance(first, BatchRequest)
    assert model.tokenizer.decode(first.request.prompt) == "first"
    assert isinstance(second, BadLine)
    assert second.custom_id == "line-2"
    assert "line 2: custom_id 'a' was used on line 1" in second.reason
    assert isinstance(third, BadLine)
    assert third.custom_id == "line-3"
    assert isinstance(fourth, BatchRequest)


def test_the_fresh_id_of_a_second_use_is_nobody_elses(model: Any) -> None:
    lines = [
        '{"custom_id": "line-3", "prompt": "x"}',
        '{"custom_id": "line-3-again", "prompt": "x"}',
        '{"custom_id": "line-3", "prompt": "x"}',
    ]
    outcomes = parse_lines(lines, model, max_tokens=4)
    assert [outcome.custom_id for outcome in outcomes] == ["line-3", "line-3-again", "line-3-again-again"]


values = st.none() | st.booleans() | st.integers(-5, 200) | st.floats() | st.text(max_size=4)
fields = st.sampled_from(
    ("prompt", "messages", "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "n", "body", "url")
)
objects = st.recursive(
    values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(entries=st.lists(st.text(max_size=12) | st.dictionaries(fields, objects, max_size=5).map(json.dumps)))
def test_whatever_a_file_holds_every_line_has_one_outcome_and_its_own_id(
    entries: list[str], model: Any
) -> None:
    lines = [line for entry in entries for line in entry.split("\n")]
    outcomes = parse_lines(lines, model, max_tokens=4)
    assert len(outcomes) == sum(bool(line.strip()) for line in lines)
    assert len({outcome.custom_id for outcome in outcomes}) == len(outcomes)


# --- what must not stop the others -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_no_new_tokens_is_not_taken_for_the_default(name: str, refuse: Callable[..., str]) -> None:
    assert "max_tokens of at least 1" in refuse({"prompt": "x", name: 0})


def test_a_line_that_is_nested_too_deeply_is_a_bad_line(refuse: Callable[..., str]) -> None:
    assert "nested too deeply" in refuse("[" * 100_000)


@pytest.mark.parametrize("name", ["prompt", "messages"])
def test_half_a_surrogate_pair_is_a_bad_line(name: str, refuse: Callable[..., str]) -> None:
    text = "\ud83d"
    refuse({name: text if name == "prompt" else [{"role": "user", "content": text}]})


def test_a_custom_id_of_a_plain_line_that_is_no_text_is_refused(refuse: Callable[..., str]) -> None:
    assert "custom_id" in refuse({"custom_id": 5, "prompt": "x"})


def test_a_line_without_an_id_leaves_those_that_others_state_to_them(model: Any) -> None:
    lines = ["no request", json.dumps({"custom_id": "line-1", "prompt": "good"}), "{}"]
    outcomes = parse_lines(lines, model, max_tokens=4, taken=line_names(lines))
    assert [outcome.custom_id for outcome in outcomes] == ["line-1-again", "line-1", "line-3"]
    assert isinstance(outcomes[1], BatchRequest)


def test_a_line_that_states_no_max_tokens_gets_what_room_there_is(
    accept: Callable[..., BatchRequest], refuse: Callable[..., str]
) -> None:
    assert accept(prompt="x" * (CONTEXT - 5)).request.max_tokens == 5
    assert accept(prompt="x" * 10).request.max_tokens == 16
    assert f"exceed the model's context of {CONTEXT}" in refuse({"prompt": "x" * CONTEXT})


def test_ends_of_a_lines_own(accept: Callable[..., BatchRequest]) -> None:
    request = accept(
        prompt="x", stop_token_ids=[3, 4], include_stop_str_in_output=True, min_tokens=2, seed=0
    ).request
    assert (request.stop_token_ids, request.include_stop_str_in_output, request.min_tokens, request.seed) == (
        (3, 4),
        True,
        2,
        0,
    )


@pytest.mark.parametrize(
    ("ends", "named"),
    [({"min_tokens": -1}, "min_tokens from 0"), ({"stop_token_ids": [-1]}, "stop_token_ids of at least 0")],
)
def test_ends_that_make_no_sense_are_refused(
    ends: dict[str, Any], named: str, refuse: Callable[..., str]
) -> None:
    assert named in refuse({"prompt": "x", **ends})
