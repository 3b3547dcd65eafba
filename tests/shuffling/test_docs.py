"""The worked example of docs/shuffling.md runs as it stands there."""

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from capstan.cli.shuffle import app

PAGE = (Path(__file__).parents[2] / "docs" / "shuffling.md").read_text(encoding="utf-8")


def test_the_worked_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPSTAN_CACHE", str(tmp_path / "cache"))
    write, use = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(write, "docs/shuffling.md", "exec"), names)
    commands = [shlex.split(line) for line in re.findall(r"^    capstan shuffle (.*)$", PAGE, re.MULTILINE)]
    assert [words[0] for words in commands] == ["doctor", "train"]
    for words in commands:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert ("h_D" if words[0] == "doctor" else "accuracy 0.") in done.stdout
    assert (tmp_path / "model.npz").exists()
    exec(compile(use, "docs/shuffling.md", "exec"), names)
    score, shape = capsys.readouterr().out.splitlines()[-2:]
    assert float(score.split()[0]) > 0.6
    assert shape == "torch.Size([64]) 313"
