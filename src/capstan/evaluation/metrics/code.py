"""Functions to complete (HumanEval): pass@k, only where running programs was allowed.

    pass@k = 1 - prod over i = n-c+1 .. n of (1 - k / i)

Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1. Without `--allow-code-execution` these metrics are
not there at all; they are not 0.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capstan.evaluation.instances import Reference
from capstan.evaluation.metrics.aggregation import Answered
from capstan.evaluation.metrics.programs import printed_by
from capstan.evaluation.metrics.stat import Stat, stat

CODE_MEASURES = ("code_eval_acc", "pass")
_INDENTATION = "    "


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
