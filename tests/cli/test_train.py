"""`capstan train dp`, and the two lines that make a DDP script Capstan's."""

import difflib
import json
import re
from pathlib import Path

import pytest

from capstan.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "data_parallel.md").read_text()


def scripts() -> tuple[str, str]:
    """The DDP script and the Capstan script of the docs."""
    ddp, ours = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
    return ddp, ours


def test_two_lines_differ_between_a_ddp_script_and_ours():
    ddp, ours = scripts()
    changes = [line for line in difflib.ndiff(ddp.splitlines(), ours.splitlines()) if line[0] in "+-"]
    assert [line[0] for line in changes].count("-") == 2
    assert [line[0] for line in changes].count("+") == 2


def test_both_scripts_of_the_docs_run_and_agree(capfd, fork, torchrun, tmp_path):
    ddp, ours = (tmp_path / name for name in ("ddp.py", "ours.py"))
    for script, text in zip((ddp, ours), scripts(), strict=True):
        script.write_text(text)
    losses = []
    for script in (ddp, ours):
        ranks = [fork("commands.py", "script", str(script), environment=each) for each in torchrun(2)]
        said = [rank.communicate(60) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said
        losses.append(json.loads("".join(out for out, _ in said)))
    assert losses[1] == losses[0]

    capfd.readouterr()
    code = main(["train", "dp", "--script", str(ours), "--algorithm", "bytegrad", "--ranks", "2"])
    out, err = capfd.readouterr()
    assert code == 0, err
    in_8_bits = json.loads(out.splitlines()[-1])
    # Gradients in 8 bits are off by less than a hundredth, so is what they have moved after 20 steps.
    assert in_8_bits == pytest.approx(losses[0], rel=0.01)
    assert in_8_bits != losses[0]


def test_algorithms_are_compared_without_running_anything(run):
    ran = run("train", "dp", "--explain", "--parameters", "1e8", "--bandwidth-mbit", "100", "--ranks", "4")
    assert ran.code == 0
    assert "low_precision_decentralized" in ran.out
    assert "Switch on" in ran.out


def test_unknown_algorithms_and_scripts_that_are_not_there_are_refused(run, tmp_path):
    ran = run("train", "dp", "--script", tmp_path / "no.py")
    assert ran.code == 1
    assert "There is no script" in ran.words
    assert "other words are its own arguments" in run("train", "dp", "no-such-script.py").words
    ran = run("train", "dp", "--algorithm", "bytegard")
    assert ran.code == 2
    assert "Did you mean 'bytegrad'" in ran.words


def test_plan_and_trace_are_printed_as_json_and_their_bytes_agree(capfd, tmp_path):
    ours = tmp_path / "ours.py"
    ours.write_text(scripts()[1])
    capfd.readouterr()
    code = main(["train", "dp", "--script", str(ours), "--algorithm", "onebit", "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    told = json.loads(out)
    assert told["verb"] == "train dp"
    assert [each["rank"] for each in told["ranks"]] == [0, 1]
    for each in (told, *told["ranks"]):
        assert each["plan"]["bytes"] == each["trace"]["bytes"]
        assert each["trace"]["phases"][1]["counts"] == {"steps": 20, "backward passes": 20}
    assert float(err.splitlines()[-1]) > 0, "what the script prints"


@pytest.mark.slow  # torchrun starts
def test_a_script_that_wraps_no_model_has_no_account(run, tmp_path):
    script = tmp_path / "nothing.py"
    script.write_text("")
    ran = run("train", "dp", "--script", script, "--json")
    assert ran.code == 1
    assert "left no account" in ran.words


def test_what_is_explained_is_printed_as_json_too(run):
    ran = run("train", "dp", "--explain", "--json")
    told = json.loads(ran.out)
    assert (told["verb"], told["trace"]) == ("train dp", None)
    assert told["plan"]["system"] == "data_parallel"
