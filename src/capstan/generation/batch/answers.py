"""Answers as OpenAI batch responses: one JSON object a line."""

from dataclasses import replace
from math import nan

from capstan.generation.batch.lines import BadLine, BatchRequest
from capstan.generation.batch.logprobs import Json, LogprobWriter
from capstan.generation.detokenizer import texts_of
from capstan.generation.model import Model
from capstan.generation.requests import Answer, Completion, TokenLogprob


def answer_line(asked: BatchRequest, completion: Completion, model: Model, *, created: int) -> Json:
    """The batch response to a request."""
    return _response(asked.custom_id, 200, answer_body(asked, completion, model, created=created), error=None)


def answer_body(asked: BatchRequest, completion: Completion, model: Model, *, created: int) -> Json:
    """The completion as OpenAI's object, of text or of a chat."""
    completion = _without_new(completion) if asked.cuts else completion
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


def _without_new(completion: Completion) -> Completion:
    """Only the prompt, where no new token was asked for."""
    answers = tuple(
        Answer(text="", tokens=(), finish_reason="length", logprobs=() if each.logprobs is not None else None)
        for each in completion.answers
    )
    return replace(completion, answers=answers)


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
    text, before = answer.text, completion.prompt_tokens
    if asked.echo:
        text = texts_of(model.tokenizer).decode(before) + text
        first = TokenLogprob(token=before[0], logprob=nan)
        scored = [first, *(completion.prompt_logprobs or ())[1:], *scored]
        before = ()
    choice: Json = {"text": text, "logprobs": None}
    if answer.logprobs is not None:
        entries = [entry for entry in scored if entry is not None]
        choice["logprobs"] = LogprobWriter(model.tokenizer, before).completion(entries)
    return choice


def _chat_choice(asked: BatchRequest, completion: Completion, answer: Answer, model: Model) -> Json:
    choice: Json = {"message": {"role": "assistant", "content": answer.text}, "logprobs": None}
    if answer.logprobs is not None:
        choice["logprobs"] = LogprobWriter(model.tokenizer, completion.prompt_tokens).chat(answer.logprobs)
    return choice


def _prompt_logprobs(asked: BatchRequest, completion: Completion, model: Model) -> Json:
    """Unless `echo` shows them among the answer's own."""
    shown_by_echo = asked.echo and any(answer.logprobs is not None for answer in completion.answers)
    if completion.prompt_logprobs is None or shown_by_echo:
        return {}
    writer = LogprobWriter(model.tokenizer, ())
    return {"prompt_logprobs": writer.prompt(completion.prompt_logprobs, completion.prompt_tokens)}
