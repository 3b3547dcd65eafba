"""Programs: functions to complete (HumanEval) and problems with cases (APPS), run where that was allowed.

    pass@k = 1 - prod over i = n-c+1 .. n of (1 - k / i)

Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1; Hendrycks et al. 2021 (arXiv 2105.09938), section 4,
and what HELM's `code_metrics_helper.py` takes for the same output. Without `--allow-code-execution` these
metrics are not there at all; they are not 0.

Differs: every case of APPS has a process and its time limit of its own, where HELM allows all cases eleven
seconds; a program that reads and writes is the main one, as `if __name__ == "__main__"` may ask.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from capstan.evaluation.instances import Reference
from capstan.evaluation.metrics.aggregation import Answered
from capstan.evaluation.metrics.programs import TIME_LIMIT_S, printed_by
from capstan.evaluation.metrics.stat import Stat, stat

CODE_MEASURES = ("code_eval_acc", "pass")
APPS_MEASURES = ("test_avg", "strict_acc")
_INDENTATION = "    "
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


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that of k out of n programs, c of them right, one is right."""
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def code_stats(name: str, run: Answered, golds: Sequence[Reference], answers: Sequence[str]) -> list[Stat]:
    """Whether programs pass their tests; nothing unless running them was allowed."""
    if not run.resources.get("allow_code_execution"):
        return []
    passed = [[float(passes(gold.test_cases or {}, answer)) for answer in answers] for gold in golds]
    flat = [each for row in passed for each in row]
    if name == "pass":
        count = int(sum(flat))
        first, best = pass_at_k(len(flat), count, 1), pass_at_k(len(flat), count, run.spec.num_outputs)
    else:
        first, best = max(row[0] for row in passed), max(flat)
    if run.spec.num_outputs == 1:
        return [stat(name, first)]
    return [stat(name, first), stat(f"{name}@{run.spec.num_outputs}", best)]


def passes(case: Mapping[str, Any], answer: str) -> bool:
    """Whether a HumanEval problem, completed with `answer`, passes its tests within three seconds."""
    prompt = str(case.get("prompt", ""))
    end = f"\n{case.get('test', '')}\ncheck({case.get('entry_point', '')})\n"
    return printed_by(completed(prompt, answer) + end) is not None


def completed(prompt: str, answer: str) -> str:
    """A program that begins inside a function, with the answer as the rest of that function.

    An answer that fits as it is written stays so. Of any other the first line gets the function's
    indentation, which models leave out or spell with a blank less.

    Differs: HELM strips every answer and begins it with four blanks.
    """
    written = prompt + answer
    if answer[:1].isspace() and _compiles(written):
        return written
    return prompt + _indentation_of(prompt) + answer.strip()


def _compiles(program: str) -> bool:
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _indentation_of(prompt: str) -> str:
    """The white space before a statement where a prompt ends: four blanks unless its docstring has other."""
    try:
        block: Any = ast.parse(prompt)
    except (SyntaxError, ValueError):
        return _INDENTATION
    first = None
    while isinstance(block, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and block.body:
        first, block = block.body[0], block.body[-1]
    if first is None or first.col_offset == 0:
        return _INDENTATION
    line = prompt.splitlines()[first.lineno - 1]
    return line[: len(line) - len(line.lstrip())]


# --- APPS -------------------------------------------------------------------------------------------------


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
