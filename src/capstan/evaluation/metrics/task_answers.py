"""Answers in words as lm-evaluation-harness judges them: filtered, then compared.

Source: lm-evaluation-harness 0.4, `api/metrics.py`, `api/task.py`. Its `exact_match` removes what it is told
to ignore, in this order: regular expressions, case, punctuation, numbers. Spaces count.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.answer_filters import pipeline
from capstan.evaluation.metrics.stat import Stat, stat

PLAIN = "none"
"""The name of the pipeline where a task names none."""


def stat_name(filter_name: str, filters: Sequence[Mapping[str, Any]]) -> str:
    """What a pipeline's figure is called: with its name where a task has several."""
    return "exact_match" if len(filters) == 1 else f"exact_match,{filter_name}"


def task_answer_metric(
    run: Answered, *, filters: Sequence[Mapping[str, Any]], ignoring: Mapping[str, Any]
) -> Measurement:
    """`exact_match` of each filter pipeline: whether its first answer equals any right text.

    Args:
        filters: pipelines, each with `name` and its steps in `filter`.
        ignoring: regexes_to_ignore, ignore_case, ignore_punctuation, ignore_numbers.
    """
    made = [(stat_name(str(each["name"]), filters), pipeline(each["filter"])) for each in filters]

    def measure(run: Answered, states: Sequence[RequestState]) -> list[Stat]:
        instance, result = states[0].instance, states[0].result
        assert result is not None
        answers = [each.text for each in result.completions]
        golds = {comparable(each.text, **ignoring) for each in instance.all_correct}
        judged = [(name, steps(answers, instance.extra)[0]) for name, steps in made]
        return [stat(name, float(comparable(answer, **ignoring) in golds)) for name, answer in judged]

    return by_instance(run, measure, wants_references=False)


def comparable(
    text: str,
    *,
    regexes_to_ignore: Sequence[str] = (),
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
) -> str:
    """A text without what does not count."""
    for pattern in regexes_to_ignore:
        text = re.sub(pattern, "", text)
    text = text.lower() if ignore_case else text
    dropped = string.punctuation * ignore_punctuation + string.digits * ignore_numbers
    return text.translate(str.maketrans("", "", dropped))
