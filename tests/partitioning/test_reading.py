"""Keys are found in functions, equal ones are equal, and what only looks alike never matches."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from capstan.errors import UsageError
from capstan.partitioning import read_key

from .key_forms import ALL, CLASS_FORMS, FORMS, IDENTITIES, LOOK_ALIKES, OPAQUE, STATE, Order
from .key_forms import site_of as site_of_row


def test_there_are_many_forms_and_many_look_alikes():
    assert len(FORMS) + len(CLASS_FORMS) >= 30
    assert len(LOOK_ALIKES) >= 30


@pytest.mark.parametrize(("group", "function"), ALL, ids=lambda each: each if isinstance(each, str) else "")
def test_the_computation_behind_a_key_is_found(group, function):
    key = read_key(function)
    assert key.level in {"traced", "source"}
    assert key.is_reusable
    assert key.term.has_input


@pytest.mark.parametrize("group", FORMS)
def test_equal_computations_have_one_identity(group):
    assert len(IDENTITIES[group]) == 1


def test_different_computations_have_different_identities():
    identities = [each for group in IDENTITIES.values() for each in group]
    assert len(set(identities)) == len(FORMS)


@pytest.mark.parametrize("group", CLASS_FORMS)
def test_methods_and_properties_of_the_rows_class_are_read_through(group):
    keys = [read_key(each, of=Order) for each in CLASS_FORMS[group]]
    assert {key.level for key in keys} <= {"traced", "source"}
    assert len({key.identity for key in keys}) == 1


@pytest.mark.parametrize("pair", range(len(LOOK_ALIKES)))
def test_what_looks_alike_does_not_match(pair):
    left, right = (read_key(each) for each in LOOK_ALIKES[pair])
    assert left.identity != right.identity


@pytest.mark.parametrize("name", OPAQUE)
def test_effects_chance_and_globals_make_a_key_opaque(name):
    function, is_reusable = OPAQUE[name]
    key = read_key(function)
    assert (key.level, key.term, key.is_reusable) == ("opaque", None, is_reusable)
    assert key.reasons
    assert read_key(function).identity == key.identity


def test_reading_a_key_has_no_effect():
    before = dict(STATE)
    for function, _ in OPAQUE.values():
        read_key(function)
    assert before == STATE
    assert OPAQUE["keeps rows"][0].__globals__["SEEN"] == []


def test_a_changed_body_is_another_key():
    def version(body):
        @dataclass
        class Row:
            name: str

            key = body

        return read_key(lambda row: row.key(), of=Row)

    first, second = version(lambda self: self.name.lower()), version(lambda self: self.name.upper())
    again = version(lambda self: self.name.lower())
    assert first.identity != second.identity
    assert first.identity == again.identity


def test_an_opaque_key_changes_with_its_code_its_closure_and_what_it_calls():
    def looping(step, body):
        def key(row):
            total = 0
            for each in row["parts"]:
                total = total + body(each) + step
            return total

        return read_key(key)

    keys = [
        looping(1, lambda each: each),
        looping(2, lambda each: each),
        looping(1, lambda each: -each),
    ]
    assert {key.level for key in keys} == {"opaque"}
    assert len({key.identity for key in keys}) == 3
    assert looping(1, lambda each: each).identity == keys[0].identity


def test_source_that_changed_since_it_was_imported_is_not_believed(tmp_path, monkeypatch):
    file = tmp_path / "changing_keys.py"
    file.write_text("def key(row):\n    return len(row['a'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import changing_keys

    file.write_text("def key(row):\n    return abs(row['a'])\n")
    key = read_key(changing_keys.key)
    assert key.level == "opaque"
    assert "source" in key.reasons[0]


def test_functions_share_the_steps_that_they_have_in_common():
    whole, part = read_key(site_of_row), read_key(lambda row: row["url"].split("/"))
    assert part.parts < whole.parts
    assert not part.parts & read_key(lambda row: row["link"].split("/")).parts


def test_two_lambdas_on_one_line_are_told_apart():
    first, second = read_key(lambda row: len(row["a"])), read_key(lambda row: len(row["b"]))
    assert (str(first), str(second)) == ("len(row['a'])", "len(row['b'])")


@pytest.mark.parametrize("wrong", [3, None, lambda: 1, lambda a, b: a, lambda row: 1, lambda row: (1, "a")])
def test_what_is_no_key_of_a_row_is_refused(wrong):
    with pytest.raises(UsageError, match="key"):
        read_key(wrong)


def test_constants_bound_to_a_partial_are_part_of_the_key():
    def part(row, size):
        total = 0
        for each in row["parts"]:
            total = total + each // size
        return total

    small, large = (read_key(functools.partial(part, size=size)) for size in (2, 3))
    assert small.level == "opaque"
    assert small.identity != large.identity


def test_a_method_whose_class_is_not_given_is_never_reused():
    assert not read_key(lambda row: row.site()).is_reusable
    assert read_key(lambda row: row.site(), of=Order).is_reusable


def test_a_class_that_makes_up_its_attributes_is_not_read_through():
    class Lazy:
        def __getattr__(self, name):
            return name

    assert read_key(lambda row: row.anything, of=Lazy).level == "opaque"


def test_what_the_rows_class_computes_makes_an_opaque_key_not_reusable():
    class Row:
        STEP = 7

        @property
        def hours(self):
            total = 0
            for each in self.times:
                total = total + each
            return total

        def __init__(self):
            self.times = []

    def looping(row):
        total = 0
        for each in row.times:
            total = total + each
        return total

    assert read_key(looping, of=Row).is_reusable
    assert not read_key(lambda row: row.hours, of=Row).is_reusable
    assert not read_key(lambda row: row.okey // row.STEP, of=Row).is_reusable


def test_identities_are_the_same_in_every_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from key_forms import *\n"
        "print([read_key(each).identity for _, each in ALL])\n"
        "print([read_key(each).identity for each, _ in OPAQUE.values()])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert all(identity in next(iter(said)) for group in IDENTITIES.values() for identity in group)
