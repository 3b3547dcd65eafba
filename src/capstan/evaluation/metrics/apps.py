"""APPS: programs that read and write, or functions that are called, run on the problem's own cases.

Source: Hendrycks et al. 2021 (arXiv 2105.09938), section 4, and what HELM's `code_metrics_helper.py` takes
for the same output; only with `--allow-code-execution`.

Differs: every case has a process and its time limit of its own, where HELM allows all cases eleven seconds; a
program that reads and writes is the main one, so what stands under `if __name__ == "__main__"` is run.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from capstan.errors import unknown_name
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.programs import TIME_LIMIT_S, printed_by
from capstan.evaluation.metrics.stat import Stat, stat

APPS_MEASURES = ("test_avg", "strict_acc")
# What the authors' own programs take for granted; numpy only where it is spoken of, for it loads slowly.
_GRANTED = """import sys, time, itertools, collections, math, fractions, random, heapq
from itertools import accumulate, product, permutations, combinations
from collections import Counter, OrderedDict, deque, defaultdict, ChainMap
from functools import lru_cache
from math import sqrt, sin, cos, tan, ceil, fabs, floor, gcd, exp, log, log2
from typing import List, Tuple
from heapq import *
"""
_CALL = """
def whole_keys(value):  # JSON made them texts
    inner = value[0] if isinstance(value, list) and value else value
    try:
        return [{int(key): each for key, each in inner.items()}] if isinstance(inner, dict) else value
    except ValueError:
        return value

case = told["case"]
owner = Solution() if case["in_class"] else None
call = getattr(owner, case["name"]) if owner else globals()[case["name"]]
found, wanted = call(*whole_keys(case["given"])), whole_keys(case["wanted"])
found = list(found) if isinstance(found, tuple) else found
right = found == wanted or (isinstance(wanted, list) and wanted and found == wanted[0])
if not right and isinstance(found, list) and found and isinstance(found[0], tuple):
    right = isinstance(wanted, list) and wanted and [list(each) for each in found] == wanted[0]
if not right:
    raise AssertionError
"""


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


def apps_stats(
    run: Answered, cases: Mapping[str, Any], *answers: str, timeout_s: float = TIME_LIMIT_S
) -> list[Stat]:
    """The mean of tests passed, and whether all were; nothing unless running programs was allowed."""
    pairs = list(zip(cases.get("inputs", ()), cases.get("outputs", ()), strict=False))
    if not run.resources.get("allow_code_execution") or not pairs:
        return []
    passes = _called(str(cases["fn_name"])) if cases.get("fn_name") is not None else _printed
    passed = [
        [passes(answer.strip(), given, wanted, timeout_s) for given, wanted in pairs] for answer in answers
    ]
    shares = [sum(each) / len(each) for each in passed]
    return [stat("test_avg", max(shares)), stat("strict_acc", float(max(shares) == 1))]


Passes = Callable[[str, Any, Any, float], bool]


def _called(name: str) -> Passes:
    """Whether a function, or a method of the answer's class Solution, gives back what it should."""

    def passes(answer: str, given: Any, wanted: Any, timeout_s: float) -> bool:
        case = {"name": name, "given": given, "wanted": wanted, "in_class": "class Solution" in answer}
        return printed_by(_granted(answer), check=_CALL, case=case, timeout_s=timeout_s) is not None

    return passes


def _printed(answer: str, given: Any, wanted: Any, timeout_s: float) -> bool:
    """Whether a program prints what it should for what it reads."""
    given, wanted = (
        "\n".join(map(str, each)) if isinstance(each, list) else str(each) for each in (given, wanted)
    )
    found = printed_by(_granted(answer), given=given, may_exit=True, timeout_s=timeout_s)
    return found is not None and is_same_output(found, wanted)


def _granted(answer: str) -> str:
    return _GRANTED + ("import numpy as np\n" if "np." in answer else "") + answer + "\n"


def is_same_output(found: str, wanted: str) -> bool:
    """Whether a program printed what was wanted, as the authors judge it.

    White space around lines does not count, nor empty lines; numbers, one a line, may differ as `np.allclose`
    lets them; else lines are sets of words, or of numbers to three places, in any order.
    """
    lines = found.splitlines()
    if wanted.strip() in ("\n".join(lines).strip(), "\n".join(each.strip() for each in lines).strip()):
        return True
    written, gold = [each for each in lines if each], [each.strip() for each in wanted.split("\n") if each]
    if written == gold or _are_close(written, gold):
        return True
    words, golden = ([each.split() for each in part] for part in (written, gold))
    return _as_sets(words) == _as_sets(golden) or _are_rounded_alike(words, golden)


def _are_close(found: Sequence[str], wanted: Sequence[str]) -> bool:
    try:
        numbers, golden = ([float(each) for each in part] for part in (found, wanted))
    except ValueError:
        return False
    return len(numbers) == len(golden) and bool(np.allclose(numbers, golden))


def _as_sets(lines: Sequence[Sequence[Any]]) -> set[frozenset[Any]]:
    return {frozenset(line) for line in lines}


def _are_rounded_alike(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> bool:
    try:
        rounded = [[[round(float(each), 3) for each in line] for line in part] for part in (found, wanted)]
    except ValueError:
        return False
    return _as_sets(rounded[0]) == _as_sets(rounded[1])
