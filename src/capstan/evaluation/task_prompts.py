"""How lm-evaluation-harness asks: each question has its own examples, a choice follows what the task says.

    context = system instruction, description
            + for each example: question + target_delimiter + answer + fewshot_delimiter
            + question [+ target_delimiter + gen_prefix]
    scored  = target_delimiter + choice, after the context

With a chat template the description is the system's message, the rest the user's (or, as `multiturn`, an
example a turn), `gen_prefix` begins the assistant's, and no delimiter stands before a choice.

Source: lm-evaluation-harness 0.4, `api/task.py` (fewshot_context), `api/samplers.py`. Examples are its draws:
one `Random(1234)` for all of a task's questions in order. Differs: a question is never among its own
examples, also where two splits are the same file; where a prompt does not fit, its last examples go
before its beginning is cut.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from capstan.errors import InputError
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.chat import Message, chat_text, opening
from capstan.evaluation.instances import EVAL_SPLITS, TRAIN, Instance
from capstan.evaluation.models import LanguageModel, Request
from capstan.evaluation.specs import AdapterSpec, Chat

_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class _Task:
    spec: AdapterSpec
    model: LanguageModel
    chat: Chat | None


def adapt_task(
    spec: AdapterSpec, instances: Sequence[Instance], model: LanguageModel, chat: Chat | None
) -> list[RequestState]:
    """All requests of a task: by trial, question, choice.

    Raises:
        InputError: examples are wanted and there are too few to take them from.
    """
    task = _Task(spec=spec, model=model, chat=chat)
    questions = [instance for instance in instances if instance.split in EVAL_SPLITS]
    pool = [instance for instance in instances if instance.split == TRAIN]
    states: list[RequestState] = []
    for trial in range(spec.num_train_trials):
        draw = _draws(spec, pool, trial)
        for question in questions:
            states += _requests(task, question, draw(question), trial)
    return [
        state if repeat == 0 else replace(state, request=replace(state.request, random=str(repeat)))
        for repeat in range(spec.num_trials)
        for state in states
    ]


# --- examples ---------------------------------------------------------------------------------------------


def _draws(
    spec: AdapterSpec, pool: Sequence[Instance], trial: int
) -> Callable[[Instance], Sequence[Instance]]:
    """What gives a question its examples: the harness's draw for its place in the file."""
    count = spec.max_train_instances
    if not count:
        return lambda _: ()
    if not pool:
        raise InputError(
            f"{count} examples are wanted, but the task names no split to take them from: set fewshot_split "
            "or training_split (or num_fewshot: 0)."
        )
    source = random.Random(_SEED + trial)
    drawn: list[list[int]] = []

    def draw(question: Instance) -> Sequence[Instance]:
        wanted = min(count + bool(question.extra.get("shares_split")), len(pool))
        while len(drawn) <= question.extra["position"]:
            drawn.append(source.sample(range(len(pool)), wanted))
        order = drawn[question.extra["position"]] if spec.sample_train else []
        rest = [at for at in range(len(pool)) if at not in order]
        others = [pool[at] for at in (*order, *rest) if not _same(pool[at], question)]
        if len(others) < count:
            raise InputError(
                f"{count} examples are wanted, but their split has only {len(others)} beside the question."
            )
        return others[:count]

    return draw


def _same(one: Instance, other: Instance) -> bool:
    return one.input == other.input and one.references == other.references


def _answer(example: Instance) -> str:
    right = example.first_correct
    return right.text if right is not None else ""


# --- contexts ---------------------------------------------------------------------------------------------


def _shown(spec: AdapterSpec, example: Instance, prefix: str) -> str:
    answer = _answer(example)
    return example.input + (spec.output_prefix + prefix + answer + spec.output_suffix if answer else "")


def _context(task: _Task, question: Instance, examples: Sequence[Instance]) -> str:
    spec, description = task.spec, str(question.extra.get("description", ""))
    begun = str(question.extra.get("gen_prefix", ""))
    prefix = f"{begun} " if begun else ""
    if task.chat is None:
        text = description + "".join(_shown(spec, each, prefix) for each in examples) + question.input
        return text + (spec.output_prefix + begun if begun else "")
    messages = opening(task.chat, description, spec.output_suffix)
    if task.chat.multiturn:
        for each in examples:
            messages.append(Message("user", each.input))
            messages.append(Message("assistant", prefix + _answer(each)))
        messages.append(Message("user", question.input))
    else:
        shots = "".join(_shown(spec, each, prefix) for each in examples)
        messages.append(Message("user", shots + question.input))
    if begun:
        messages.append(Message("assistant", begun))
    return chat_text(task.model, messages, continues=bool(begun))


def _requests(
    task: _Task, question: Instance, examples: Sequence[Instance], trial: int
) -> Iterator[RequestState]:
    spec = task.spec
    if spec.method == "generation":
        context, num_examples, is_cut = _fitted(task, question, examples, "")
        request = Request(
            prompt=context,
            num_completions=spec.num_outputs,
            temperature=spec.temperature,
            max_tokens=spec.max_tokens,
            stop_sequences=spec.stop_sequences,
            random=spec.random,
        )
        yield _state(question, request, trial, num_examples, is_cut)
        return
    delimiter = spec.output_prefix if task.chat is None else ""
    for index, reference in enumerate(question.references):
        continuation = delimiter + reference.text
        context, num_examples, is_cut = _fitted(task, question, examples, continuation)
        request = Request(prompt=context + continuation, max_tokens=0, echo=True, continuation=continuation)
        choice = {"reference_index": index, "request_mode": "original"}
        yield _state(question, request, trial, num_examples, is_cut, **choice)


def _state(
    question: Instance, request: Request, trial: int, num_examples: int, is_cut: bool, **more: Any
) -> RequestState:
    return RequestState(
        instance=question,
        request=request,
        train_trial=trial,
        num_examples=num_examples,
        prompt_truncated=is_cut,
        **more,
    )


def _fitted(
    task: _Task, question: Instance, examples: Sequence[Instance], continuation: str
) -> tuple[str, int, bool]:
    """The context that leaves room for what follows, how many examples it shows, whether it was cut."""
    model, longest = task.model, task.model.limits.max_request_length - task.spec.max_tokens

    def fits(text: str) -> bool:
        return len(text.encode(errors="surrogatepass")) <= longest or len(model.encode(text)) <= longest

    for count in range(len(examples), -1, -1):
        context = _context(task, question, examples[:count]) or model.limits.prefix_token
        if fits(context + continuation):
            return context, count, False
    tokens = model.encode(context)
    while tokens and not fits(model.decode(tokens) + continuation):
        tokens = tokens[max(1, len(model.encode(model.decode(tokens) + continuation)) - longest) :]
    return model.decode(tokens), 0, True
