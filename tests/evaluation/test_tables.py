"""One's own tables and general settings: what they say is used or refused with a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import CapstanError, InputError, UsageError
from capstan.evaluation import run_spec_of
from capstan.evaluation.instances import Instance
from capstan.evaluation.running import prepare
from capstan.evaluation.scenarios import SCENARIOS, load_instances, scenario_of
from capstan.evaluation.scenarios.tables import filled

OWN = {"name": "own", "data": "d.jsonl", "input": "{q}", "answer": "a"}
CHOICES = {"choices": "o"}
Write = Callable[..., str]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """`written(data, **more)`: the path of a table with its data, rows or bytes of a file."""

    def write(data: Any = ({"q": "a?", "a": "b"},), /, **more: Any) -> str:
        told = {key: value for key, value in (OWN | more).items() if value != "left out"}
        if isinstance(data, bytes):
            (tmp_path / told["data"]).write_bytes(data)
        else:
            (tmp_path / told["data"]).write_text("".join(json.dumps(row) + "\n" for row in data))
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(told))
        return str(path)

    return write


def instances_of(path: str) -> list[Instance]:
    return load_instances(run_spec_of(path).scenario_spec, None, scenario=scenario_of(path))


@pytest.mark.parametrize(
    ("cell", "more"),
    [
        ("apple,stone,cloud", {"choices_separator": ","}),
        ("apple; stone ;cloud", {"choices_separator": ";"}),
        ('["apple", "stone", "cloud"]', {}),
    ],
)
@pytest.mark.parametrize("answer", ["B", "1", "stone"])
def test_a_cell_of_choices_is_a_list(written, cell, more, answer):
    quoted = '"' + cell.replace('"', '""') + '"'
    data = f"q,o,a\nWhich?,{quoted},{answer}\n".encode()
    (instance,) = instances_of(written(data, data="d.csv", **CHOICES, **more))
    assert [each.text for each in instance.references] == ["apple", "stone", "cloud"]
    assert [each.text for each in instance.all_correct] == ["stone"]


def test_a_cell_that_is_no_list_says_how_to_write_one(written):
    path = written(b'q,o,a\nWhich?,"apple,stone,cloud",A\n', data="d.csv", **CHOICES)
    with pytest.raises(InputError, match=r"d\.csv, row 1.*Write it as JSON.*choices_separator"):
        instances_of(path)


def test_braces_name_fields_of_fields_and_fields_with_spaces(written):
    row = {"q": {"text": "hi"}, "The Question": "why", "a": "b"}
    (instance,) = instances_of(written([row], input='{q.text} {The Question} {"x": 1} {}'))
    assert instance.input == 'hi why {"x": 1} {}'


@given(st.dictionaries(st.from_regex(r"\w{1,5}", fullmatch=True), st.text(), min_size=1))
def test_a_template_of_a_rows_fields_is_their_texts(row):
    template = "|".join(f"{{{name}}}" for name in row)
    assert filled(template, row, "here") == "|".join(row.values())


@pytest.mark.parametrize(
    "row",
    [
        {"q": None, "a": "b"}, {"q": "a?", "a": None}, {"q": "a?", "a": []}, {"q": "a?", "a": ""},
        {"q": "a?", "a": ["b", None]}, {"q": ["a?"], "a": "b"}, {"q": "a?"}, {"q": "a?", "a": float("nan")},
    ],
)  # fmt: skip
def test_what_is_null_or_missing_is_refused_with_its_row(written, row):
    with pytest.raises(InputError, match=r"d\.jsonl, row 2"):
        instances_of(written([{"q": "x", "a": "y"}, row]))


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["x", "y"], 2), (["x", "y"], -1), (["x", "y"], "C"), (["x", None], 0), (["x"], 0), ([], 0), ("x", 0),
        ({"a": 1}, 0), (["x", "y"], 0.5), (["x", "y"], "²"), ([str(at) * 3 for at in range(27)], 0),
    ],
)  # fmt: skip
def test_choices_and_answers_that_do_not_fit_are_refused(written, options, answer):
    with pytest.raises(InputError, match=r"d\.jsonl, row 1"):
        instances_of(written([{"q": "?", "o": options, "a": answer}], **CHOICES))


def test_twelve_choices_have_twelve_letters(written):
    rows = [{"q": "?", "o": [str(at) * 3 for at in range(12)], "a": "L"}]
    assert instances_of(written(rows, **CHOICES))[0].all_correct[0].text == "11" * 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"adapter": "generation"}, "adapter must be a mapping"),
        ({"adapter": {"method": "chat"}}, "adapter method 'chat'"),
        ({"adapter": {"max_tokens": "many"}}, "max_tokens"),
        ({"adapter": {"max_token": 3}}, "Did you mean 'max_tokens'"),
        ({"adapter": {"temperature": -1}}, "temperature"),
        ({"adapter": {"method": "multiple_choice_joint"}}, "wants choices"),
        ({"adapter": {"method": "language_modeling", "max_tokens": 3}}, "max_tokens means nothing"),
        ({"choices": "o", "adapter": {"method": "multiple_choice_separate_original", "temperature": 1}},
         "temperature means nothing"),
        ({"metrics": ["exactmatch"]}, "Did you mean 'exact_match'"),
        ({"metrics": []}, "metrics must be a list"),
        ({"main_metric": "accuracy"}, "main_metric 'accuracy' is none of the metrics"),
        ({"name": ""}, "name must be"),
        ({"input": ["q"]}, "input must be"),
        ({"data": "nofile.jsonl\0"}, "data"),
        ({"choices_separator": ","}, "choices_separator goes with choices"),
        ({"answers": "a"}, "unknown answers"),
    ],
)  # fmt: skip
def test_what_a_table_says_wrong_is_named(written, tmp_path, more, words):
    path = written()
    Path(path).write_text(yaml.safe_dump(OWN | more))
    with pytest.raises(CapstanError, match=words):
        instances_of(path)


def test_what_an_adapter_says_holds(written, toy_model):
    settings = {
        "stop": "END",
        "max_tokens": 7,
        "temperature": 0.5,
        "instructions": "Answer.",
        "input_noun": None,
    }
    (state,) = prepare(run_spec_of(written(adapter=settings)), toy_model).states
    asked = state.request
    assert (asked.stop_sequences, asked.max_tokens, asked.temperature) == (("END",), 7, 0.5)
    assert asked.prompt == "Answer.\n\na?\nAnswer:"
    rows = [{"q": "?", "o": ["x", "y"], "a": 0}]
    joint = written(rows, **CHOICES, adapter={"stop": ["."], "temperature": 1, "num_outputs": 3})
    assert run_spec_of(joint).adapter_spec.stop_sequences == (".",)
    assert run_spec_of(joint).adapter_spec.num_outputs == 3
    separate = {"method": "multiple_choice_separate_original", "instructions": "Answer."}
    state = prepare(run_spec_of(written(rows, **CHOICES, adapter=separate)), toy_model).states[0]
    assert state.request.prompt == "Answer.\n\n? x"
    assert run_spec_of(written(adapter=None)).adapter_spec.method == "generation"


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b'{"q": "caf\xe9?", "a": "b"}\n', "d.jsonl", "not UTF-8"),
        (b"q,a\ncaf\xe9,b\n", "d.csv", "not UTF-8"),
        (b"q,a\nx,y,z\n", "d.csv", "row 1 has more cells"),
        (b"q,a\nx\n", "d.csv", "row 1: the field 'a' is null"),
        (b"\x1f\x8bnothing", "d.jsonl.gz", "cannot be read"),
        (b"PAR1", "d.parquet", "no Parquet file"),
        (b"[1, 2]", "d.json", "row 1: wants an object"),
        (b"", "d.jsonl", "empty"),
        (b'{"q": "a?"', "d.jsonl", "no JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(written, data, name, words):
    with pytest.raises(InputError, match=words):
        instances_of(written(data, data=name))


@pytest.mark.parametrize("data", [b'\xef\xbb\xbf{"q": "a?", "a": "b"}\r\n', b'[{"q": "a?", "a": "b"}]'])
def test_marks_of_byte_order_and_lists_are_read(written, data):
    assert [each.input for each in instances_of(written(data, data="d.json"))] == ["a?"]


def test_a_yaml_that_says_a_thing_twice_or_is_no_text_is_refused(written):
    path = Path(written())
    path.write_text(path.read_text() + "input: '{a}'\n")
    with pytest.raises(InputError, match="'input' stands twice"):
        run_spec_of(str(path))
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        run_spec_of(str(path))


def test_a_python_file_that_does_not_run_is_named(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("import nothinglikethis\n")
    with pytest.raises(InputError, match="does not run: ModuleNotFoundError"):
        scenario_of(str(path))


# --- general settings -------------------------------------------------------------------------------------

NEEDED = {
    "mmlu": "subject=anatomy", "commonsense": "dataset=openbookqa,method=multiple_choice_separate_calibrated",
    "dyck_language": "num_parenthesis_pairs=3", "raft": "subset=overruling",
    "ice": "subset=hk", "blimp": "phenomenon=ellipsis", "wikifact": "k=5,subject=capital",
    "code": "dataset=apps",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({each.name for each in SCENARIOS}))
def test_general_settings_hold_for_every_entry(name):
    entry = f"{name}:{_needed(name)}temperature=0.25,max_tokens=11,num_outputs=3,max_eval_instances=5"
    asked = run_spec_of(entry).adapter_spec
    assert (asked.temperature, asked.max_tokens, asked.num_outputs) == (0.25, 11, 3)
    if name != "raft":
        asked = run_spec_of(f"{name}:{_needed(name)}instructions=Say it.").adapter_spec
        assert asked.instructions == "Say it.\n"


def _needed(name: str) -> str:
    from inspect import signature

    scenario = scenario_of(name)
    missing = [
        p.name
        for p in signature(scenario.run_spec).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    told = dict(part.split("=") for part in NEEDED.get(name, "").split(",") if part)
    return "".join(f"{each}={told.get(each, 'x')}," for each in missing)


SCORED = ["wikitext", "commonsense:dataset=hellaswag,method=multiple_choice_separate_original"]


@pytest.mark.parametrize("entry", SCORED)
def test_what_is_scored_stays_scored_whatever_is_said_of_generation(entry, toy_root, toy_model):
    settings = "max_tokens=11,temperature=0.5,max_eval_instances=3"
    spec = run_spec_of(entry + ("," if ":" in entry else ":") + settings, root=toy_root)
    plain = run_spec_of(entry, root=toy_root).with_adapter(max_eval_instances=3)
    asked = prepare(spec, toy_model, root=toy_root).states
    assert all(state.request.is_scored for state in asked)
    prompts = [state.request.prompt for state in asked]
    assert prompts == [state.request.prompt for state in prepare(plain, toy_model, root=toy_root).states]


@pytest.mark.parametrize(
    "setting",
    ["max_eval_instances=ten", "max_eval_instances=0", "max_eval_instances=-3", "temperature=hot",
     "temperature=nan", "temperature=-1", "max_tokens=1.5", "num_train_trials=0", "num_outputs=",
     "max_tokens=-2"],
)  # fmt: skip
def test_a_setting_that_is_no_number_or_too_small_is_refused_by_name(setting):
    with pytest.raises(UsageError, match=setting.partition("=")[0]):
        run_spec_of(f"gsm:{setting}")
