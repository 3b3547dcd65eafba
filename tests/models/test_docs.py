"""The page about this floor: its example runs."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from capstan.storage import Checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def test_the_example_runs(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for name, place in {"models/llama": folder_of("llama"), "models/tuned": tmp_path}.items():
        assert f'"{name}"' in example
        example = example.replace(f'"{name}"', repr(str(place)))
    exec(compile(example, "docs/models.md", "exec"), {})
    first, last = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (first[:2], last[:2]) == (["0", "2"], ["2", "4"])
    assert Checkpoint(tmp_path).size_bytes == Checkpoint(folder_of("llama")).size_bytes
