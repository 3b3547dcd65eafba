"""`make bench-check` fails where a bar does not hold, unless its record says why that is accepted."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "check_records.py"
WHOLE: dict[str, Any] = {"goal": 2.0, "reached": 1.0, "holds": False}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_records", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECORDS", tmp_path)
    return module


def _write(check: ModuleType, bar: dict[str, Any], *, without: str = "") -> None:
    record = {field: "" for field in check.FIELDS if field != without} | {"bars": {"speed": bar}}
    (check.RECORDS / "plans-made-up.json").write_text(json.dumps(record))


@pytest.mark.parametrize("bar", [WHOLE | {"holds": True}, WHOLE | {"accepted": "the disk is slower"}])
def test_a_bar_that_holds_or_is_accepted_with_a_reason_passes(check, bar):
    _write(check, bar)
    assert list(check.incomplete_records()) == []


@pytest.mark.parametrize("bar", [WHOLE, WHOLE | {"accepted": " "}])
def test_a_bar_that_does_not_hold_fails_without_a_reason(check, bar):
    _write(check, bar)
    (problem,) = check.incomplete_records()
    assert problem.startswith("plans-made-up.json: bar 'speed' does not hold (1.0, wanted 2.0)")


def test_a_record_names_the_tree_that_it_measured(check):
    _write(check, WHOLE | {"holds": True}, without="tree")
    assert list(check.incomplete_records()) == ["plans-made-up.json lacks tree"]


def test_a_record_of_another_tree_is_named_as_outdated(check):
    _write(check, WHOLE | {"holds": True})
    assert list(check.outdated_records()) == ["plans-made-up.json is older than plans"]
