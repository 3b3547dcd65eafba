"""The examples of docs/relations.md run, and their results are right."""

import re
from pathlib import Path

import numpy as np

PAGE = (Path(__file__).parents[2] / "docs" / "relations.md").read_text(encoding="utf-8")


def test_the_examples_of_the_docs_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(text, "docs/relations.md", "exec"), names)
    features, weights = np.load("features.npy"), np.load("weights.npy")
    # Sums of 500 products of normals in float64, in another order.
    assert np.allclose(np.load("scores.npy"), np.maximum(features @ weights, 0), rtol=0, atol=1e-10)
    wanted = features.T @ (features @ weights > 0).astype(float)
    assert np.allclose(names["slope"], wanted, rtol=0, atol=1e-10)
    assert np.array_equal(names["result"].to_array(), np.full((2, 2), 64.0))
    printed = capsys.readouterr().out
    assert "tiles b=" in printed
    assert "the default would send" in printed
