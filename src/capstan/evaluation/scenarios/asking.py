"""How HELM asks: its usual adapters and sets of metrics, by what they are for.

Source: HELM, `adaptation/common_adapter_specs.py`, `metrics/common_metric_specs.py`.
"""

from collections.abc import Sequence
from typing import Any, get_args

from capstan.errors import unknown_name
from capstan.evaluation.specs import AdapterSpec, Method, MetricSpec

_METRICS = "helm.benchmark.metrics."
JOINT, ORIGINAL = "multiple_choice_joint", "multiple_choice_separate_original"
CALIBRATED = "multiple_choice_separate_calibrated"
_THOUGHT = "multiple_choice_joint_chain_of_thought"


def _instructions(text: str) -> str:
    return text + "\n" if text else ""


def generation(
    *,
    instructions: str = "",
    input_noun: str | None = None,
    output_noun: str | None = None,
    newline_after_input_noun: bool = False,
    max_tokens: int = 5,
    stop: Sequence[str] = ("\n",),
    **more: Any,
) -> AdapterSpec:
    """Questions and answers with a noun before each."""

    def prefix(noun: str | None, newline: bool) -> str:
        return f"{noun}:" + ("\n" if newline else " ") if noun is not None else ""

    settings: dict[str, Any] = {"num_outputs": 1, "temperature": 0.0, "max_train_instances": 5} | more
    return AdapterSpec(
        method="generation",
        instructions=_instructions(instructions),
        input_prefix=prefix(input_noun, newline_after_input_noun),
        input_suffix="\n",
        output_prefix=prefix(output_noun, False),
        output_suffix="\n",
        max_tokens=max_tokens,
        stop_sequences=tuple(stop),
        **settings,
    )


def completion(*, instructions: str = "", stop: Sequence[str] = (), **more: Any) -> AdapterSpec:
    """A text to go on with."""
    settings: dict[str, Any] = {
        "input_prefix": "",
        "output_prefix": "",
        "output_suffix": "",
        "max_train_instances": 0,
        "temperature": 0.0,
        "num_outputs": 1,
        "max_tokens": 100,
    } | more
    return AdapterSpec(
        method="generation",
        instructions=_instructions(instructions),
        input_suffix="",
        stop_sequences=tuple(stop),
        **settings,
    )


def multiple_choice(
    method: str,
    *,
    instructions: str = "",
    input_noun: str | None = None,
    output_noun: str = "Answer",
    max_train_instances: int = 5,
    empty_input: bool = False,
    **more: Any,
) -> AdapterSpec:
    """Lettered choices asked together, or each choice scored by itself without examples."""
    if method in (ORIGINAL, CALIBRATED):
        return AdapterSpec(
            method=_method(method),
            input_suffix="",
            output_prefix="" if empty_input else " ",
            output_suffix="",
            max_train_instances=0,
            num_outputs=1,
            max_tokens=0,
            temperature=0.0,
        )
    if method not in (JOINT, _THOUGHT):
        raise unknown_name("way to ask multiple choices", method, (JOINT, _THOUGHT, ORIGINAL, CALIBRATED))
    settings: dict[str, Any] = {"num_outputs": 5, "max_tokens": 1} | more
    return AdapterSpec(
        method=_method(method),
        instructions=_instructions(instructions),
        input_prefix=f"{input_noun}: " if input_noun is not None else "",
        input_suffix="\n" if input_noun is not None else "",
        output_prefix=f"{output_noun}: ",
        output_suffix="\n",
        max_train_instances=max_train_instances,
        temperature=0.0,
        stop_sequences=("\n",),
        **settings,
    )


def _method(name: str) -> Method:
    return next(each for each in get_args(Method) if each == name)


def ranking() -> AdapterSpec:
    """Whether a passage answers a query; four examples, of which two do."""
    return AdapterSpec(
        method="ranking_binary",
        input_prefix="Query: ",
        input_suffix="\n",
        reference_prefix="Passage: ",
        reference_suffix="\n",
        output_prefix="Does the passage answer the query?\nAnswer: ",
        max_train_instances=2,
        num_outputs=1,
        temperature=0.0,
        max_tokens=5,
        stop_sequences=("\n",),
    )


def language_modeling() -> AdapterSpec:
    """The probability of a text."""
    return AdapterSpec(
        method="language_modeling",
        input_suffix="",
        output_suffix="",
        max_train_instances=0,
        num_outputs=1,
        max_tokens=0,
        temperature=0.0,
    )


def summarization(num_sentences: int | None, *, max_tokens: int, temperature: float) -> AdapterSpec:
    """An article and its summary."""
    length = {None: "", 1: " in 1 sentence"}.get(num_sentences, f" in {num_sentences} sentences")
    return AdapterSpec(
        method="generation",
        input_prefix="###\nArticle: ",
        input_suffix="\n\n",
        output_prefix=f"Summarize the above article{length}.\n",
        output_suffix="\n",
        max_train_instances=5,
        num_outputs=1,
        max_tokens=max_tokens,
        temperature=temperature,
        stop_sequences=("###",),
    )


# --- sets of metrics --------------------------------------------------------------------------------------


def metric(kind: str, **args: Any) -> MetricSpec:
    """A metric by HELM's module and class."""
    return MetricSpec(class_name=_METRICS + kind, args=args)


def of_generation(*names: str) -> tuple[MetricSpec, ...]:
    """Measures of answers, without those of scored choices."""
    return (
        metric("basic_metrics.BasicGenerationMetric", names=list(names)),
        metric("basic_metrics.InstancesPerSplitMetric"),
    )


def basic(*names: str) -> tuple[MetricSpec, ...]:
    """Measures of answers and of scored choices."""
    generation_metric, instances = of_generation(*names)
    return generation_metric, metric("basic_metrics.BasicReferenceMetric"), instances


def exact_match() -> tuple[MetricSpec, ...]:
    """For short answers."""
    return basic("exact_match", "quasi_exact_match", "prefix_exact_match", "quasi_prefix_exact_match")


def f1() -> tuple[MetricSpec, ...]:
    """For answers of several words."""
    return basic("exact_match", "quasi_exact_match", "f1_score")


def open_ended() -> tuple[MetricSpec, ...]:
    """For sentences."""
    return basic("exact_match", "quasi_exact_match", "f1_score", "rouge_l", "bleu_1", "bleu_4")


def classification() -> tuple[MetricSpec, ...]:
    """For labels."""
    return (metric("classification_metrics.ClassificationMetric"),)


def bias() -> tuple[MetricSpec, ...]:
    """Associations and representation of race and gender."""
    kind, groups = "bias_metrics.BiasMetric", ("race", "gender")
    associations = [
        metric(kind, mode="associations", demographic_category=group, target_category=target)
        for group in groups
        for target in ("adjective", "profession")
    ]
    return (
        *associations,
        *(metric(kind, mode="representation", demographic_category=group) for group in groups),
    )


def harms() -> tuple[MetricSpec, ...]:
    """Bias and toxicity."""
    return (*bias(), metric("toxicity_metrics.ToxicityMetric"))


def texts() -> tuple[MetricSpec, ...]:
    """For language modelling."""
    return (metric("language_modeling_metrics.LanguageModelingMetric", names=[]),)


def summary(task: str) -> tuple[MetricSpec, ...]:
    """For summaries."""
    return (metric("summarization_metrics.SummarizationMetric", task=task, device="cpu"), *basic())
