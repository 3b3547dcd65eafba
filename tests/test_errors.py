"""Errors: one small tree, and messages that say what to do."""

import inspect
import re
import sys

import pytest

from capstan import errors
from capstan.errors import CapstanError, MissingExtra, UsageError, require_extra, unknown_name

CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if inspect.isclass(found) and issubclass(found, BaseException)
}


def test_everything_raised_on_purpose_is_a_capstan_error():
    assert set(CLASSES) > {"CapstanError", "UsageError"}
    assert all(issubclass(found, CapstanError) for found in CLASSES.values())
    assert not issubclass(CapstanError, OSError | ValueError | RuntimeError)


def test_a_wrong_call_exits_with_2_and_every_other_error_with_1():
    assert {name for name, found in CLASSES.items() if found.exit_code == 2} == {"UsageError"}
    assert {found.exit_code for found in CLASSES.values()} == {1, 2}


def test_the_tree_in_the_docstring_lists_every_class_below_its_parent():
    """Depth is four characters a level; a class hangs below the last one that is a level higher."""
    drawn, above = {}, {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"((?:[│ ]   |[├└]── )*)([A-Z]\w+)(?:\s{2,}\w|$)", line)
        if match:
            depth, name = len(match[1]) // 4, match[2]
            above[depth] = name
            drawn[name] = above.get(depth - 1, "Exception")
    assert drawn == {name: found.__base__.__name__ for name, found in CLASSES.items()}


def test_every_class_says_what_is_the_matter():
    assert all(found.__doc__ for found in CLASSES.values())


@pytest.mark.parametrize(
    ("name", "hint"),
    [("relu", " Did you mean 'gelu'?"), ("identty", " Did you mean 'identity'?"), ("zzz", "")],
)
def test_an_unknown_name_suggests_the_nearest_one(name, hint):
    error = unknown_name("codec", name, {"identity", "gelu", "cast"})
    assert isinstance(error, UsageError)
    assert str(error) == f"There is no codec {name!r}.{hint} Known: cast, gelu, identity."


def test_an_unknown_name_where_none_is_known_says_so():
    assert (
        str(unknown_name("argument of gsm", "wrong", []))
        == "There is no argument of gsm 'wrong', nor another."
    )


def test_require_extra_is_silent_when_everything_is_there():
    require_extra("generation", "json", "os.path")


def test_require_extra_names_the_extra_and_only_what_is_missing():
    with pytest.raises(MissingExtra) as caught:
        require_extra("shuffling", "json", "capstan_no_such_a", "capstan_no_such_b")
    message = str(caught.value)
    assert "This needs capstan_no_such_a, capstan_no_such_b, which" in message
    assert "pip install 'capstan-ml[shuffling]'" in message


def test_require_extra_knows_that_a_part_of_a_missing_package_is_missing():
    with pytest.raises(MissingExtra, match=r"capstan_no_such\.parquet"):
        require_extra("shuffling", "capstan_no_such.parquet")


def test_require_extra_imports_nothing():
    assert "this" not in sys.modules
    require_extra("generation", "this")
    assert "this" not in sys.modules
