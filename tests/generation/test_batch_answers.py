"""Answers in the shape of OpenAI's batch responses, and as valid JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capstan.generation.batch.answers import answer_line, error_line
from capstan.generation.batch.lines import BadLine, BatchRequest
from capstan.generation.requests import Answer, Completion, Request, TokenLogprob

A, B, C, D = 1, 2, 3, 4


class Letters:
    """Token 1 is "a", token 2 is "bb", token 3 is "ccc", and so on."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(chr(96 + token) * token for token in tokens)


MODEL: Any = SimpleNamespace(folder=Path("models/tiny"), tokenizer=Letters())


def scored(token: int, logprob: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(token=token, logprob=logprob, top=top)


def answer(*tokens: int, logprobs: tuple[TokenLogprob, ...] | None = None, reason: Any = "length") -> Answer:
    text = Letters().decode(tokens)
    return Answer(text=text, tokens=tokens, finish_reason=reason, logprobs=logprobs)


def line_of(
    *answers: Answer,
    is_chat: bool = False,
    echo: bool = False,
    prompt: tuple[int, ...] = (A, B),
    **more: Any,
) -> dict[str, Any]:
    """The line for a request, after a journey through JSON without NaN."""
    asked = BatchRequest("a", Request(prompt=prompt, id="a"), is_chat, echo)
    completion = Completion(id="a", prompt_tokens=prompt, answers=answers, **more)
    line = answer_line(asked, completion, MODEL, created=17)
    text = json.dumps(line, allow_nan=False)
    back = json.loads(text)
    assert back == line
    return back


def only_choice(line: dict[str, Any]) -> dict[str, Any]:
    (choice,) = line["response"]["body"]["choices"]
    return choice


def test_a_completion() -> None:
    assert line_of(answer(C, D), answer(D, reason="stop")) == {
        "id": "batch_req_a",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "req_a",
            "body": {
                "id": "cmpl-a",
                "object": "text_completion",
                "created": 17,
                "model": "tiny",
                "choices": [
                    {"index": 0, "finish_reason": "length", "text": "cccdddd", "logprobs": None},
                    {"index": 1, "finish_reason": "stop", "text": "dddd", "logprobs": None},
                ],
                "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
            },
        },
        "error": None,
    }


def test_a_chat() -> None:
    body = line_of(answer(C), is_chat=True)["response"]["body"]
    assert body["id"] == "chatcmpl-a"
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": "ccc"},
            "logprobs": None,
        }
    ]


def test_a_bad_line() -> None:
    assert error_line(BadLine("a", "line 3: no")) == {
        "id": "batch_req_a",
        "custom_id": "a",
        "response": {
            "status_code": 400,
            "request_id": "req_a",
            "body": {
                "error": {
                    "message": "line 3: no",
                    "type": "invalid_request_error",
                    "param": None,
                    "code": "invalid_request",
                }
            },
        },
        "error": {"code": "invalid_request", "message": "line 3: no"},
    }


def test_logprobs_of_a_completion_are_lists_of_equal_length() -> None:
    entries = (scored(C, -0.5, (C, -0.5), (A, -1.5)), scored(D, -2.0, (B, -0.25), (D, -2.0)))
    assert only_choice(line_of(answer(C, D, logprobs=entries)))["logprobs"] == {
        "tokens": ["ccc", "dddd"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"ccc": -0.5, "a": -1.5}, {"bb": -0.25, "dddd": -2.0}],
        "text_offset": [0, 3],
    }


def test_logprobs_without_the_likeliest_beside_them() -> None:
    logprobs = only_choice(line_of(answer(C, logprobs=(scored(C, -0.5),))))["logprobs"]
    assert logprobs["token_logprobs"] == [-0.5]
    assert logprobs["top_logprobs"] == [None]


def test_logprobs_of_an_answer_without_tokens_are_empty() -> None:
    assert only_choice(line_of(answer(logprobs=())))["logprobs"] == {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }


def test_echo_puts_the_prompt_before_the_answer() -> None:
    choice = only_choice(line_of(answer(C), echo=True))
    assert choice["text"] == "abbccc"
    assert choice["logprobs"] is None


def test_echo_with_logprobs_scores_the_prompt_too() -> None:
    line = line_of(
        answer(C, logprobs=(scored(C, -0.5, (C, -0.5)),)),
        echo=True,
        prompt_logprobs=(None, scored(B, -3.0, (A, -0.125))),
    )
    choice = only_choice(line)
    assert choice["text"] == "abbccc"
    assert choice["logprobs"] == {
        "tokens": ["a", "bb", "ccc"],
        "token_logprobs": [None, -3.0, -0.5],
        "top_logprobs": [None, {"a": -0.125}, {"ccc": -0.5}],
        "text_offset": [0, 1, 3],
    }
    assert "prompt_logprobs" not in choice
    assert line["response"]["body"]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 1,
        "total_tokens": 3,
    }


def test_echo_of_a_prompt_of_one_token_with_logprobs() -> None:
    entries = (scored(C, -0.5),)
    logprobs = only_choice(
        line_of(answer(C, logprobs=entries), echo=True, prompt=(B,), prompt_logprobs=(None,))
    )["logprobs"]
    assert logprobs["tokens"] == ["bb", "ccc"]
    assert logprobs["token_logprobs"] == [None, -0.5]
    assert logprobs["text_offset"] == [0, 2]


@pytest.mark.parametrize("how", [{}, {"echo": True}, {"is_chat": True}], ids=["plain", "echo", "chat"])
def test_prompt_logprobs_that_were_asked_for_are_a_list_of_their_own(how: dict[str, bool]) -> None:
    entries = (None, scored(B, -3.0, (A, -0.125)))
    choice = only_choice(line_of(answer(C), prompt_logprobs=entries, **how))
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            "1": {"logprob": -0.125, "decoded_token": "a"},
            "2": {"logprob": -3.0, "decoded_token": "bb"},
        },
    ]


def test_logprobs_of_a_chat_have_an_entry_for_each_token() -> None:
    entries = (scored(C, -0.5, (C, -0.5), (A, -1.5)), scored(D, -2.0))
    logprobs = only_choice(line_of(answer(C, D, logprobs=entries), is_chat=True))["logprobs"]
    assert logprobs == {
        "content": [
            {
                "token": "ccc",
                "logprob": -0.5,
                "bytes": [99, 99, 99],
                "top_logprobs": [
                    {"token": "ccc", "logprob": -0.5, "bytes": [99, 99, 99]},
                    {"token": "a", "logprob": -1.5, "bytes": [97]},
                ],
            },
            {"token": "dddd", "logprob": -2.0, "bytes": [100] * 4, "top_logprobs": []},
        ]
    }


def test_without_a_tokenizer_texts_are_empty_and_numbers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODEL, "tokenizer", None)
    entries = (scored(C, -0.5, (C, -0.5)), scored(D, -2.0))
    logprobs = only_choice(line_of(answer(C, D, logprobs=entries)))["logprobs"]
    assert logprobs["token_logprobs"] == [-0.5, -2.0]
    assert logprobs["text_offset"] == [0, 0]
