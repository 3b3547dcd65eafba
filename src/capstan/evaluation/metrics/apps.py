"""APPS: the share of a problem's cases that the best answer passes, and whether it passes all.

Source: HELM, `metrics/code_metrics.py`.
"""

from collections.abc import Sequence

from capstan.errors import unknown_name
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.code import APPS_MEASURES, apps_stats
from capstan.evaluation.metrics.programs import TIME_LIMIT_S
from capstan.evaluation.metrics.stat import Stat


def apps_metric(
    run: Answered, *, names: Sequence[str] = APPS_MEASURES, timeout: float = TIME_LIMIT_S
) -> Measurement:
    """Of each problem's best answer: the share of cases passed, and whether all were."""
    unknown = [name for name in names if name not in APPS_MEASURES]
    if unknown:
        raise unknown_name("measure of APPS", unknown[0], APPS_MEASURES)

    def measure(run: Answered, states: Sequence[RequestState]) -> list[Stat]:
        gold, result = states[0].instance.references[0], states[0].result
        assert result is not None
        answers = [completion.text for completion in result.completions]
        stats = apps_stats(run, gold.test_cases or {}, *answers, timeout_s=timeout)
        return [each for each in stats if each.name.name in names]

    return by_instance(run, measure, wants_references=False)
