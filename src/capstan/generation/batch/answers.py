"""Answers as OpenAI batch responses: one JSON object a line."""

from collections.abc import Sequence
from itertools import accumulate
from math import isnan, nan
from typing import Any

from capstan.generation.batch.lines import BadLine, BatchRequest
from capstan.generation.model import Model
from capstan.generation.requests import Answer, Completion, TokenLogprob

Json = dict[str, Any]


def answer_line(asked: BatchRequest, completion: Completion, model: Model, *, created: int) -> Json:
    """The batch response to a request."""
    return _response(asked.custom_id, 200, answer_body(asked, completion, model, created=created), error=None)


def answer_body(asked: BatchRequest, completion: Completion, model: Model, *, created: int) -> Json:
    """The completion as OpenAI's object, of text or of a chat."""
    num_prompt = len(completion.prompt_tokens)
    num_new = sum(len(answer.tokens) for answer in completion.answers)
    choice = _chat_choice if asked.is_chat else _text_choice
    return {
        "id": f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{asked.custom_id}",
        "object": "chat.completion" if asked.is_chat else "text_completion",
        "created": created,
        "model": model.folder.name,
        "choices": [
            {
                "index": index,
                "finish_reason": answer.finish_reason,
                **choice(asked, completion, answer, model),
                **_prompt_logprobs(asked, completion, model),
            }
            for index, answer in enumerate(completion.answers)
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
        },
    }


def error_line(bad: BadLine) -> Json:
    """The batch response to a line that cannot be answered."""
    error = {"code": "invalid_request", "message": bad.reason}
    body = {
        "error": {
            "message": bad.reason,
            "type": "invalid_request_error",
            "param": None,
            "code": error["code"],
        }
    }
    return _response(bad.custom_id, 400, body, error=error)


def _response(custom_id: str, status: int, body: Json, *, error: dict[str, str] | None) -> Json:
    return {
        "id": f"batch_req_{custom_id}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{custom_id}", "body": body},
        "error": error,
    }


def _text_choice(asked: BatchRequest, completion: Completion, answer: Answer, model: Model) -> Json:
    scored: list[TokenLogprob | None] = list(answer.logprobs or ())
    text = answer.text
    if asked.echo:
        text = _text(model, completion.prompt_tokens) + text
        first = TokenLogprob(token=completion.prompt_tokens[0], logprob=nan)
        scored = [first, *(completion.prompt_logprobs or ())[1:], *scored]
    choice: Json = {"text": text, "logprobs": None}
    if answer.logprobs is not None:
        choice["logprobs"] = text_logprobs([entry for entry in scored if entry is not None], model)
    return choice


def text_logprobs(entries: Sequence[TokenLogprob], model: Model, *, offset: int = 0) -> Json:
    """OpenAI's parallel lists; an echoed prompt's first token has none. Their text begins at `offset`."""
    tokens = [_text(model, [entry.token]) for entry in entries]
    tops = [{_text(model, [token]): value for token, value in entry.top} for entry in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [None if isnan(entry.logprob) else entry.logprob for entry in entries],
        "top_logprobs": [top or None for top in tops],
        "text_offset": list(accumulate(map(len, tokens), initial=offset))[:-1],
    }


def _chat_choice(asked: BatchRequest, completion: Completion, answer: Answer, model: Model) -> Json:
    choice: Json = {"message": {"role": "assistant", "content": answer.text}, "logprobs": None}
    if answer.logprobs is not None:
        choice["logprobs"] = chat_logprobs(answer.logprobs, model)
    return choice


def chat_logprobs(entries: Sequence[TokenLogprob], model: Model) -> Json:
    """OpenAI's list of a chat's tokens."""
    return {"content": [_chat_entry(entry, model) for entry in entries]}


def _chat_entry(entry: TokenLogprob, model: Model) -> Json:
    def one(token: int, logprob: float) -> Json:
        text = _text(model, [token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    tops = [one(token, value) for token, value in entry.top]
    return {**one(entry.token, entry.logprob), "top_logprobs": tops}


def _prompt_logprobs(asked: BatchRequest, completion: Completion, model: Model) -> Json:
    """Unless `echo` shows them among the answer's own."""
    shown_by_echo = asked.echo and any(answer.logprobs is not None for answer in completion.answers)
    if completion.prompt_logprobs is None or shown_by_echo:
        return {}
    return {"prompt_logprobs": [_prompt_entry(entry, model) for entry in completion.prompt_logprobs]}


def _prompt_entry(entry: TokenLogprob | None, model: Model) -> Json | None:
    if entry is None:
        return None
    listed = dict(entry.top) | {entry.token: entry.logprob}
    return {
        str(token): {"logprob": value, "decoded_token": _text(model, [token])}
        for token, value in listed.items()
    }


def _text(model: Model, tokens: Sequence[int]) -> str:
    return str(model.tokenizer.decode(list(tokens))) if model.tokenizer is not None else ""
