"""`capstan train dp`, and the two lines that make a DDP script Capstan's."""

import difflib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "data_parallel.md").read_text()


def scripts() -> tuple[str, str]:
    """The DDP script and the Capstan script of the docs."""
    ddp, ours = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
    return ddp, ours


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "capstan", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_two_lines_differ_between_a_ddp_script_and_ours():
    ddp, ours = scripts()
    changes = [line for line in difflib.ndiff(ddp.splitlines(), ours.splitlines()) if line[0] in "+-"]
    assert [line[0] for line in changes].count("-") == 2
    assert [line[0] for line in changes].count("+") == 2


def test_both_scripts_of_the_docs_run_and_agree(tmp_path):
    losses = []
    for number, (text, algorithm) in enumerate(
        zip((*scripts(), scripts()[1]), ("gradient_allreduce", "gradient_allreduce", "bytegrad"), strict=True)
    ):
        script = tmp_path / f"train{number}.py"
        script.write_text(text)
        done = run("train", "dp", "--script", str(script), "--algorithm", algorithm, "--ranks", "2")
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(done.stdout.splitlines()[-1]))
    ddp, plain, in_8_bits = losses
    assert plain == ddp
    # Gradients in 8 bits are off by less than a hundredth, so is what they have moved after 20 steps.
    assert in_8_bits == pytest.approx(ddp, rel=0.01)
    assert in_8_bits != ddp


def test_algorithms_are_compared_without_running_anything():
    done = run("train", "dp", "--explain", "--parameters", "1e8", "--bandwidth-mbit", "100", "--ranks", "4")
    assert done.returncode == 0
    assert "low_precision_decentralized" in done.stdout
    assert "Switch on" in done.stdout


def test_unknown_algorithms_and_scripts_that_are_not_there_are_refused(tmp_path):
    done = run("train", "dp", "--script", str(tmp_path / "no.py"))
    assert done.returncode == 1
    assert "There is no script" in done.stderr
    done = run("train", "dp", "--algorithm", "bytegard")
    assert done.returncode == 2
    assert "Did you mean 'bytegrad'" in done.stderr
