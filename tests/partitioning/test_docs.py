"""The example of docs/partitioning.md runs, and says what the page says."""

import re
import sys
import types
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "partitioning.md").read_text(encoding="utf-8")


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "worked.py").write_text(text)  # a file, because functions are read from their source
    module = types.ModuleType("worked")
    monkeypatch.setitem(sys.modules, "worked", module)
    exec(compile(text, str(tmp_path / "worked.py"), "exec"), vars(module))
    assert set(module.advice.choice) == {"pages", "sites"}
    assert module.found.is_same
    assert len(module.before) == 4000
    shuffled = [phase.traffic.on("host->disk") for phase in module.found.trace.phases]
    assert shuffled[0] > 0 == shuffled[1]
    assert "no shuffle" in capsys.readouterr().out
