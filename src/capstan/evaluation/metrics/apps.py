"""APPS: programs that read and write, run on the problem's own cases.

Source: Hendrycks et al. 2021 (arXiv 2105.09938), section 4; only with `--allow-code-execution`.
"""

from collections.abc import Sequence

from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.code import apps_stats
from capstan.evaluation.metrics.stat import Stat


def apps_metric(run: Answered, *, timeout: float = 3) -> Measurement:
    """Of each problem: the mean of cases passed, and whether all were. `timeout` is HELM's."""

    def measure(run: Answered, states: Sequence[RequestState]) -> list[Stat]:
        gold, result = states[0].instance.references[0], states[0].result
        assert result is not None
        return apps_stats(run, gold.test_cases or {}, result.completions[0].text)

    return by_instance(run, measure, wants_references=False)
