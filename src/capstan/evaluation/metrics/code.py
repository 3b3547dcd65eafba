"""Programs: pass@k, and running them apart with limits, only where that was asked for.

    pass@k = 1 - prod over i = n-c+1 .. n of (1 - k / i)

Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1. Running what a model wrote is dangerous: it happens
in another process with limits on time and memory, which is no wall against ill will, and only with
`--allow-code-execution`. Without it these metrics are not there at all; they are not 0.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capstan.evaluation.instances import Reference
from capstan.evaluation.metrics.aggregation import Answered
from capstan.evaluation.metrics.stat import Stat, stat

_TIME_LIMIT_S = 3.0
_MEMORY_LIMIT_BYTES = 2 << 30
_LIMITS = (
    "import resource as r;"
    f"r.setrlimit(r.RLIMIT_AS,({_MEMORY_LIMIT_BYTES},)*2);"
    "r.setrlimit(r.RLIMIT_CPU,(4,4));r.setrlimit(r.RLIMIT_FSIZE,(0,0));r.setrlimit(r.RLIMIT_NPROC,(0,0))\n"
)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that of k out of n programs, c of them right, one is right."""
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def code_stats(
    name: str, run: Answered, golds: Sequence[Reference], answers: Sequence[str | None]
) -> list[Stat]:
    """Whether programs pass their tests; nothing unless running them was allowed."""
    if not run.resources.get("allow_code_execution"):
        return []
    passed = [[float(passes(gold.test_cases or {}, answer or "")) for answer in answers] for gold in golds]
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
    program = (
        f"{case.get('prompt', '')}{answer}\n{case.get('test', '')}\ncheck({case.get('entry_point', '')})\n"
    )
    return runs(program) is not None


def runs(program: str, *, given: str = "") -> str | None:
    """What a program prints, or None if it fails, takes too long or too much memory."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _LIMITS + program],
                input=given,
                capture_output=True,
                text=True,
                timeout=_TIME_LIMIT_S,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin"},
                check=False,
            )
        except (subprocess.TimeoutExpired, UnicodeDecodeError, ValueError):
            return None
    return done.stdout if done.returncode == 0 else None


def apps_stats(run: Answered, cases: Mapping[str, Any], answer: str) -> list[Stat]:
    """APPS: the mean of tests passed, and whether all were; nothing unless running programs was allowed."""
    pairs = list(zip(cases.get("inputs", ()), cases.get("outputs", ()), strict=False))
    if not run.resources.get("allow_code_execution") or not pairs:
        return []
    right = [_same_output(runs(answer, given=str(given)), str(wanted)) for given, wanted in pairs]
    return [stat("test_avg", sum(right) / len(right)), stat("strict_acc", float(all(right)))]


def _same_output(given: str | None, wanted: str) -> bool:
    return given is not None and given.split() == wanted.split()
