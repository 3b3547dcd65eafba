"""From instances to requests: six ways to ask, with HELM's exact prompts.

Source: HELM, `adaptation/adapters/`. Each function below is one of its adapters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from capstan.errors import InputError
from capstan.evaluation.examples import choose_examples
from capstan.evaluation.instances import EVAL_SPLITS, TRAIN, Instance
from capstan.evaluation.models import LanguageModel, Request, Result
from capstan.evaluation.prompts import ModelRoom, Prompt, Room, fitted
from capstan.evaluation.specs import AdapterSpec, Method
from capstan.evaluation.windows import text_windows

_NO_ANSWER = "n/a"
_YES, _NO = "Yes", "No"


@dataclass(frozen=True, kw_only=True)
class RequestState:
    """A request, what it was made of, and, once it is answered, its result.

    `output_mapping` says which reference a letter stands for. `request_mode` is "original" or "calibration".
    """

    instance: Instance
    request: Request
    train_trial: int = 0
    reference_index: int | None = None
    request_mode: str | None = None
    output_mapping: Mapping[str, str] | None = None
    result: Result | None = None
    num_examples: int = 0
    prompt_truncated: bool = False
    num_conditioning_tokens: int = 0

    def to_dict(self, spec: AdapterSpec) -> dict[str, Any]:
        """As it stands in HELM's scenario_state.json."""
        own: dict[str, Any] = {
            "instance": self.instance.to_dict(),
            "train_trial_index": self.train_trial,
            "request": self.request.to_dict(spec.model, spec.model_deployment),
            "num_train_instances": self.num_examples,
            "prompt_truncated": self.prompt_truncated,
            "num_conditioning_tokens": self.num_conditioning_tokens,
        }
        for name in ("reference_index", "request_mode"):
            if getattr(self, name) is not None:
                own[name] = getattr(self, name)
        if self.output_mapping is not None:
            own["output_mapping"] = dict(self.output_mapping)
        if self.result is not None:
            own["result"] = _result_dict(self.result)
        return own


def _result_dict(result: Result) -> dict[str, Any]:
    own: dict[str, Any] = {
        "success": True,
        "embedding": [],
        "completions": [
            {
                "text": each.text,
                "logprob": each.logprob,
                "tokens": [{"text": token.text, "logprob": token.logprob} for token in each.tokens],
                "finish_reason": {"reason": each.finish_reason},
            }
            for each in result.completions
        ],
        "cached": False,
        "request_time": result.seconds,
    }
    if result.batch_size is not None:
        own |= {"batch_size": result.batch_size, "batch_request_time": result.seconds}
    return own


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """What every adapter needs: how to ask, whose context must suffice, and this trial's examples."""

    spec: AdapterSpec
    room: Room
    examples: tuple[Instance, ...]
    trial: int
    model: LanguageModel


def adapt(
    spec: AdapterSpec, instances: Sequence[Instance], model: LanguageModel, *, num_reserved: int = 0
) -> list[RequestState]:
    """All requests of a run, in HELM's order: by trial, instance, reference.

    `num_reserved` tokens of the context stay free for what is put around each prompt.

    Raises:
        InputError: no instance to evaluate, or training instances in language modelling.
    """
    evaluated = [instance for instance in instances if instance.split in EVAL_SPLITS]
    train = [instance for instance in instances if instance.split == TRAIN]
    if not evaluated:
        splits = ", ".join(EVAL_SPLITS)
        raise InputError(f"There is no instance to evaluate: none is of the splits {splits}.")
    ask = _ADAPTERS[spec.method]
    states: list[RequestState] = []
    for trial in range(1 if spec.method == "language_modeling" else spec.num_train_trials):
        examples = choose_examples(
            train, count=spec.max_train_instances, trial=trial, sample=spec.sample_train
        )
        room = ModelRoom(model, num_reserved)
        asking = _Asking(spec=spec, room=room, examples=tuple(examples), trial=trial, model=model)
        mine = [state for instance in evaluated for state in ask(asking, instance)]
        states += mine
        for repeat in range(1, spec.num_trials):
            states += [replace(each, request=replace(each.request, random=str(repeat))) for each in mine]
    return states


# --- blocks: how one instance is written ------------------------------------------------------------------

Write = Callable[[AdapterSpec, Instance, bool, int | None], str]


def _written_output(spec: AdapterSpec, instance: Instance, reference: int | None) -> str:
    if reference is not None:
        return instance.references[reference].text
    right = instance.all_correct
    if not right:
        return _NO_ANSWER
    return ", ".join(each.text for each in right) if spec.multi_label else right[0].text


def _write_plain(spec: AdapterSpec, instance: Instance, answered: bool, reference: int | None) -> str:
    text = spec.input_prefix + instance.input + spec.input_suffix
    if not answered:
        return text + spec.output_prefix.rstrip()
    return text + spec.output_prefix + _written_output(spec, instance, reference) + spec.output_suffix


def letter_prefix(prefix: str, index: int) -> str:
    """`"A. "` for the third reference becomes `"C. "`."""
    first = next(character for character in prefix if character.isalnum())
    return prefix.replace(first, chr(ord(first) + index))


def _letter(spec: AdapterSpec, index: int) -> str:
    return letter_prefix(next(each for each in spec.reference_prefix if each.isalnum()), index)


def _written_choices(spec: AdapterSpec, instance: Instance) -> tuple[str, list[int]]:
    """A question with its lettered choices, and which of them are right."""
    text = spec.input_prefix + instance.input + spec.input_suffix
    for index, reference in enumerate(instance.references):
        text += letter_prefix(spec.reference_prefix, index) + reference.text + spec.reference_suffix
    return text, [index for index, each in enumerate(instance.references) if each.is_correct]


def _named(names: Sequence[str], spec: AdapterSpec) -> str:
    if not names:
        return _NO_ANSWER
    return ", ".join(names) if spec.multi_label else names[0]


def _write_joint(spec: AdapterSpec, instance: Instance, answered: bool, _: int | None) -> str:
    text, right = _written_choices(spec, instance)
    if not answered:
        return text + spec.output_prefix.rstrip()
    letters = _named([_letter(spec, index) for index in right], spec)
    return text + spec.output_prefix + letters + spec.output_suffix


def _write_thought(spec: AdapterSpec, instance: Instance, answered: bool, _: int | None) -> str:
    text, right = _written_choices(spec, instance)
    if not answered:
        return text + spec.output_prefix.rstrip()
    thought = str(instance.extra.get("chain_of_thought", ""))
    # HELM answers with the whole prefix here, "A. ", and with the letter alone without a chain of thought.
    answer = _named([letter_prefix(spec.reference_prefix, index) for index in right], spec)
    reasons = spec.chain_of_thought_prefix + thought + spec.chain_of_thought_suffix
    return text + spec.output_prefix + reasons + answer + spec.output_suffix


def _write_ranking(spec: AdapterSpec, instance: Instance, answered: bool, reference: int | None) -> str:
    wanted = range(len(instance.references)) if instance.split == TRAIN else [reference or 0]
    blocks = []
    for index in wanted:
        passage = instance.references[index]
        text = spec.reference_prefix + passage.text + spec.reference_suffix
        text += spec.input_prefix + instance.input + spec.input_suffix
        if answered:
            text += spec.output_prefix + (_YES if passage.is_correct else _NO) + spec.output_suffix
        else:
            text += spec.output_prefix.rstrip()
        blocks.append(text)
    return spec.instance_prefix.join(blocks)


def _prompt(
    asking: _Asking, instance: Instance, write: Write, *, answered: bool = False, reference: int | None = None
) -> Prompt:
    spec = asking.spec
    examples = tuple(write(spec, example, True, None) for example in asking.examples)
    question = write(spec, instance, answered, reference)
    return fitted(Prompt(spec=spec, examples=examples, question=question), asking.room)


# --- adapters ---------------------------------------------------------------------------------------------


def _state(
    asking: _Asking, instance: Instance, prompt: Prompt, request: Request, **more: Any
) -> RequestState:
    return RequestState(
        instance=instance,
        request=request,
        train_trial=asking.trial,
        num_examples=prompt.num_examples,
        prompt_truncated=prompt.is_truncated,
        **more,
    )


def _generation(asking: _Asking, instance: Instance) -> Iterator[RequestState]:
    spec = asking.spec
    prompt = _prompt(asking, instance, _write_plain)
    request = Request(
        prompt=prompt.text,
        num_completions=spec.num_outputs,
        temperature=spec.temperature,
        max_tokens=spec.max_tokens,
        stop_sequences=spec.stop_sequences,
        random=spec.random,
    )
    yield _state(asking, instance, prompt, request)


def _joint(asking: _Asking, instance: Instance, write: Write = _write_joint) -> Iterator[RequestState]:
    spec = asking.spec
    prompt = _prompt(asking, instance, write)
    thinks = spec.method == "multiple_choice_joint_chain_of_thought"
    request = Request(
        prompt=prompt.text,
        num_completions=1,
        top_k_per_token=spec.num_outputs,
        temperature=spec.temperature,
        max_tokens=spec.max_tokens,
        stop_sequences=spec.stop_sequences if thinks else (),
        random=spec.random,
    )
    mapping = {_letter(spec, index): each.text for index, each in enumerate(instance.references)}
    yield _state(asking, instance, prompt, request, output_mapping=mapping)


def _thought(asking: _Asking, instance: Instance) -> Iterator[RequestState]:
    yield from _joint(asking, instance, _write_thought)


def _scored(asking: _Asking, original: Instance, asked: Instance, reference: int, mode: str) -> RequestState:
    prompt = _prompt(asking, asked, _write_plain, answered=True, reference=reference)
    continuation = " " + original.references[reference].text
    request = Request(prompt=prompt.text, max_tokens=0, echo=True, continuation=continuation)
    return _state(asking, original, prompt, request, reference_index=reference, request_mode=mode)


def _separate(asking: _Asking, instance: Instance) -> Iterator[RequestState]:
    for index in range(len(instance.references)):
        yield _scored(asking, instance, instance, index, "original")


def _calibrated(asking: _Asking, instance: Instance) -> Iterator[RequestState]:
    # How likely the answer is anyway: after a bare "Answer:", without examples.
    bare = replace(asking, examples=())
    for index in range(len(instance.references)):
        yield _scored(asking, instance, instance, index, "original")
        yield _scored(bare, instance, replace(instance, input="Answer:"), index, "calibration")


def _ranking(asking: _Asking, instance: Instance) -> Iterator[RequestState]:
    spec = asking.spec
    for index in range(len(instance.references)):
        prompt = _prompt(asking, instance, _write_ranking, reference=index)
        request = Request(
            prompt=prompt.text,
            num_completions=spec.num_outputs,
            temperature=spec.temperature,
            max_tokens=spec.max_tokens,
            stop_sequences=spec.stop_sequences,
            random=spec.random,
        )
        yield _state(asking, instance, prompt, request, reference_index=index, request_mode="original")


def _language_modeling(asking: _Asking, instance: Instance) -> Iterator[RequestState]:
    if asking.examples:
        raise InputError("Language modelling takes no training instances; give splits valid or test only.")
    for window in text_windows(instance.input, asking.model, num_new=asking.spec.max_tokens):
        request = Request(prompt=window.text, max_tokens=asking.spec.max_tokens, echo=True)
        yield RequestState(
            instance=instance, request=request, num_conditioning_tokens=window.num_conditioning_tokens
        )


_ADAPTERS: Mapping[Method, Callable[[_Asking, Instance], Iterator[RequestState]]] = {
    "generation": _generation,
    "multiple_choice_joint": _joint,
    "multiple_choice_joint_chain_of_thought": _thought,
    "multiple_choice_separate_original": _separate,
    "multiple_choice_separate_calibrated": _calibrated,
    "language_modeling": _language_modeling,
    "ranking_binary": _ranking,
}
