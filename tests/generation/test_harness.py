"""The adapter for lm-evaluation-harness, which is tested where that is installed: benchmarks/generation."""

import importlib
import sys

import pytest

from capstan.errors import MissingExtra


def test_without_the_harness_the_adapter_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "capstan.generation.harness", raising=False)
    with pytest.raises(MissingExtra, match=r"capstan-ml\[harness\]"):
        importlib.import_module("capstan.generation.harness")
