"""metrics: from answers to numbers, in seven families.

Accuracy (`text_match`, `ranking`, `code`), calibration, robustness and fairness (the worst case in
`aggregation`), bias, toxicity, efficiency. `measure_run(run, specs)` computes what a run's specs name.
"""

from collections.abc import Callable, Sequence
from typing import Any

from capstan.errors import UsageError, unknown_name
from capstan.evaluation.metrics.aggregation import Answered, InstanceStats, Measurement
from capstan.evaluation.metrics.apps import apps_metric
from capstan.evaluation.metrics.basic import (
    generation_metric,
    instances_metric,
    language_modeling_metric,
    reference_metric,
)
from capstan.evaluation.metrics.bbq import bbq_metric
from capstan.evaluation.metrics.bias import bias_metric
from capstan.evaluation.metrics.choice import choice_metric
from capstan.evaluation.metrics.classification import classification_metric
from capstan.evaluation.metrics.code import APPS_MEASURES, CODE_MEASURES
from capstan.evaluation.metrics.copyright import copyright_metric
from capstan.evaluation.metrics.disinformation import variety_metric
from capstan.evaluation.metrics.ranking import ranking_metric
from capstan.evaluation.metrics.stat import Context, Stat, StatName, merged, stat
from capstan.evaluation.metrics.summarization import summarization_metric
from capstan.evaluation.metrics.task_answers import task_answer_metric
from capstan.evaluation.metrics.toxicity import toxicity_metric
from capstan.evaluation.specs import MetricSpec

__all__ = [
    "METRICS",
    "PROGRAM_MEASURES",
    "Answered",
    "Context",
    "InstanceStats",
    "Measurement",
    "Stat",
    "StatName",
    "measure_run",
    "stat",
]

PROGRAM_MEASURES = (*CODE_MEASURES, *APPS_MEASURES)
"""Those for which programs are run."""

METRICS: dict[str, Callable[..., Measurement]] = {
    "helm.benchmark.metrics.basic_metrics.BasicGenerationMetric": generation_metric,
    "helm.benchmark.metrics.basic_metrics.BasicReferenceMetric": reference_metric,
    "helm.benchmark.metrics.basic_metrics.InstancesPerSplitMetric": instances_metric,
    "helm.benchmark.metrics.language_modeling_metrics.LanguageModelingMetric": language_modeling_metric,
    "helm.benchmark.metrics.ranking_metrics.RankingMetric": ranking_metric,
    "helm.benchmark.metrics.bias_metrics.BiasMetric": bias_metric,
    "helm.benchmark.metrics.bbq_metrics.BBQMetric": bbq_metric,
    "helm.benchmark.metrics.classification_metrics.ClassificationMetric": classification_metric,
    "helm.benchmark.metrics.copyright_metrics.BasicCopyrightMetric": copyright_metric,
    "helm.benchmark.metrics.disinformation_metrics.DisinformationMetric": variety_metric,
    "helm.benchmark.metrics.summarization_metrics.SummarizationMetric": summarization_metric,
    "helm.benchmark.metrics.toxicity_metrics.ToxicityMetric": toxicity_metric,
    "helm.benchmark.metrics.code_metrics.APPSMetric": apps_metric,
    "helm.benchmark.metrics.choice_metrics.ChoiceMetric": choice_metric,
    "helm.benchmark.metrics.choice_metrics.TaskAnswerMetric": task_answer_metric,
}
"""HELM's class names and what computes them here."""


def measure_run(run: Answered, specs: Sequence[MetricSpec]) -> Measurement:
    """All statistics of a run, and of each of its instances, those of several metrics put together.

    Raises:
        UsageError: a metric that is not known, or arguments that it does not take.
    """
    stats: list[Stat] = []
    per_instance: list[InstanceStats] = []
    for spec in specs:
        if spec.class_name not in METRICS:
            raise unknown_name("metric", spec.class_name, METRICS)
        found = _measured(run, spec)
        stats += found.stats
        per_instance += found.per_instance
    return Measurement(list(merged(stats).values()), _joined(per_instance))


def _measured(run: Answered, spec: MetricSpec) -> Measurement:
    args: dict[str, Any] = dict(spec.args)
    try:
        return METRICS[spec.class_name](run, **args)
    except TypeError as error:
        if "unexpected keyword" not in str(error) and "required" not in str(error):
            raise
        raise UsageError(f"The metric {spec.short_name} does not take {args}: {error}") from error


def _joined(found: Sequence[InstanceStats]) -> list[InstanceStats]:
    """One entry for each instance and trial; of a window of a text each stays, as its values add up."""
    by_key: dict[tuple[Any, ...], InstanceStats] = {}
    for each in found:
        key = (each.instance, each.train_trial)
        before = by_key[key].stats if key in by_key else ()
        stats = tuple(merged([*before, *each.stats]).values())
        by_key[key] = InstanceStats(instance=each.instance, train_trial=each.train_trial, stats=stats)
    return list(by_key.values())
