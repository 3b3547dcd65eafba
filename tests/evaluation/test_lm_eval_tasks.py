"""Tasks of lm-evaluation-harness: every key is used as there, or refused by name."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from capstan.errors import CapstanError, InputError
from capstan.evaluation import Completion, Limits, Request, RequestState, Result, Token, run_spec_of
from capstan.evaluation.metrics.answer_filters import pipeline
from capstan.evaluation.models import num_tokens_after
from capstan.evaluation.running import measure, prepare
from capstan.evaluation.scenarios import scenario_of
from toy_model import ToyModel

CITIES = [
    {"q": "The capital of France is", "c": ["Paris", "Rome"], "a": 0},
    {"q": "The capital of Italy is", "c": ["Oslo", "Rome"], "a": 1},
    {"q": "The capital of Norway is", "c": ["Oslo", "Bern"], "a": 0},
    {"q": "The capital of Spain is", "c": ["Rome", "Madrid"], "a": 1},
]
CHOICES = {
    "task": "cities", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "t.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "c",
    "doc_to_target": "a",
}  # fmt: skip
WORDS = {
    "task": "words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "t.jsonl"}},
    "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "a",
}  # fmt: skip

Write = Callable[..., str]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """`written(task, rows, **more)`: the path of a task with its data."""

    def write(task: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = CITIES, **more: Any) -> str:
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "task.yaml"
        path.write_text(yaml.safe_dump(dict(task) | more))
        return str(path)

    return write


def states_of(path: str, model: ToyModel, **adapter: Any) -> list[RequestState]:
    spec = run_spec_of(path)
    return list(prepare(spec.with_adapter(**adapter), model, scenario=scenario_of(path)).states)


def test_a_choice_follows_the_tasks_delimiter(written, toy_model):
    for delimiter in (" ", "\n", "", " => "):
        states = states_of(written(CHOICES, target_delimiter=delimiter), toy_model)
        assert states[0].request.prompt == f"The capital of France is{delimiter}Paris"
        assert states[0].request.continuation == f"{delimiter}Paris"


def test_a_choices_tokens_are_those_it_adds_to_its_context():
    # Tokens are pairs of characters, so a delimiter may join the token before it.
    def encode(text: str) -> list[int]:
        return [hash(text[at : at + 2]) for at in range(0, len(text), 2)]

    assert num_tokens_after(encode, "abc", "\nde") == 1
    assert num_tokens_after(encode, "ab ", "cd") == 2


def answered(
    states: Sequence[RequestState], answers: Callable[[Request], Sequence[Token]]
) -> list[RequestState]:
    return [
        replace(
            each,
            result=Result(
                completions=(Completion(text="".join(t.text for t in tokens), tokens=tuple(tokens)),)
            ),
        )
        for each in states
        for tokens in [answers(each.request)]
    ]


def test_acc_adds_up_the_tokens_after_the_context(written):
    class Merging(ToyModel):
        """Of characters, but "A:" and what follows it are one token."""

        def encode(self, text: str) -> list[int]:
            return [ord(each[0]) for each in self.parts(text)]

        def parts(self, text: str) -> list[str]:
            found, at = [], 0
            while at < len(text):
                size = 2 if text[at] == ":" and text[at + 1 : at + 2] == "\n" else 1
                found.append(text[at : at + size])
                at += size
            return found

    model = Merging()
    rows = [{"q": "Q:", "c": ["\nx", "y"], "a": 0}]
    path = written(CHOICES, rows, target_delimiter="")
    weights = {"x": -1.0, "y": -1.5, ":\n": -9.0, ":": -9.0, "Q": -50.0}
    states = answered(
        states_of(path, model), lambda request: [Token(t, weights[t]) for t in model.parts(request.prompt)]
    )
    found = {each.name.name: each.mean for each in measure(run_spec_of(path), states, model).stats}
    # -1 against -1.5; as many tokens as the choice has alone would count the joined one, -10 against -1.5.
    assert found["acc"] == 1.0
    assert found["acc_norm"] == 1.0


def shown_before(state: RequestState) -> str:
    return state.request.prompt[: -len(state.instance.input + state.request.continuation)]


def test_a_question_is_never_among_its_own_examples(written, toy_model):
    for split in ({"fewshot_split": "test"}, {"training_split": "test"}):
        for sampler in ("default", "first_n"):
            how = {"num_fewshot": 2, "fewshot_config": {"sampler": sampler}} | split
            for state in states_of(written(CHOICES, **how), toy_model):
                assert state.num_examples == 2
                assert state.instance.input not in shown_before(state)


def test_examples_are_the_harnesss_draws(written, toy_model):
    shown = [{"q": f"shot {at}", "c": ["l", "r"], "a": at % 2} for at in range(9)]
    path = written(CHOICES, num_fewshot=3, fewshot_split="dev",
                   dataset_kwargs={"data_files": {"test": "t.jsonl", "dev": "d.jsonl"}})  # fmt: skip
    Path(path).with_name("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    source = random.Random(1234)
    wanted = [source.sample(shown, 3) for _ in CITIES]
    for limit in (None, 2):
        for state in states_of(path, toy_model, max_eval_instances=limit):
            at = next(at for at, row in enumerate(CITIES) if row["q"] == state.instance.input)
            texts = "".join(f"{row['q']} {row['c'][row['a']]}\n\n" for row in wanted[at])
            assert shown_before(state) == texts


def test_first_n_shows_the_first_and_delimiters_hold_for_examples(written, toy_model):
    how = {"num_fewshot": 2, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    path = written(
        CHOICES, target_delimiter="\n", fewshot_delimiter="\n###\n", description="About {{c[0]}}: ", **how
    )
    state = states_of(path, toy_model)[6]
    assert state.request.prompt == (
        "About Rome: The capital of France is\nParis\n###\nThe capital of Italy is\nRome\n###\n"
        "The capital of Spain is\nRome"
    )


def test_examples_may_be_written_in_the_task(written, toy_model):
    samples = [{"q": "One and one is", "c": ["one", "two"], "a": 1}]
    path = written(CHOICES, num_fewshot=1, fewshot_config={"samples": samples, "doc_to_text": "> {{q}}"})
    assert shown_before(states_of(path, toy_model)[0]) == "> One and one is two\n\n"


def test_a_beginning_of_the_answer_stands_in_examples_and_before_the_question_is_answered(written, toy_model):
    rows = [{"q": f"q{at}", "a": f"a{at}"} for at in range(2)]
    how = {"num_fewshot": 1, "fewshot_split": "test", "gen_prefix": "So:"}
    assert states_of(written(WORDS, rows, **how), toy_model)[0].request.prompt == "q1 So: a1\n\nq0 So:"


@pytest.mark.parametrize("count", [1, 2])
def test_examples_without_a_split_are_refused(written, toy_model, count):
    path = written(CHOICES, num_fewshot=count)
    with pytest.raises(InputError, match="names no split to take them from"):
        states_of(path, toy_model)
    with pytest.raises(InputError, match="names no split to take them from"):
        states_of(written(CHOICES), toy_model, max_train_instances=count)


def test_more_examples_than_there_are_is_an_error(written, toy_model):
    with pytest.raises(InputError, match="4 examples are wanted, but their split has only 3"):
        states_of(written(CHOICES, num_fewshot=4, fewshot_split="test"), toy_model)


def test_examples_go_before_the_context_is_cut_and_the_choice_stays(written):
    rows = [{"q": "w " * 30 + str(at), "c": ["yes", "no"], "a": 0} for at in range(4)]
    how = {"num_fewshot": 3, "fewshot_split": "test"}
    state = states_of(written(CHOICES, rows, **how), ToyModel(longest=80))[0]
    assert state.num_examples == 1
    assert not state.prompt_truncated
    state = states_of(written(CHOICES, rows, **how), ToyModel(longest=10))[0]
    assert state.prompt_truncated
    assert state.request.prompt.endswith("0 yes")


@pytest.mark.parametrize(
    ("target", "row", "right"),
    [
        ("{{label}}", {"label": 2, "c": ["2", "1", "4", "0"]}, ["4"]),
        ("label", {"label": 1, "c": ["3", "1", "2"]}, ["1"]),
        ("label", {"label": "2", "c": ["3", "1", "2"]}, ["2"]),
        ("{{['x', 'y'].index(label)}}", {"label": "y", "c": ["1", "0"]}, ["0"]),
        ("{{label}}", {"label": "b", "c": ["a", "b"]}, ["b"]),
        ("label", {"label": [0, 2], "c": ["a", "b", "c"]}, ["a", "c"]),
        (1, {"c": ["a", "b"]}, ["b"]),
    ],
)
def test_a_target_that_is_a_number_is_an_index(written, toy_model, target, row, right):
    path = written(CHOICES, [{"q": "?"} | row], doc_to_target=target)
    assert [each.text for each in states_of(path, toy_model)[0].instance.all_correct] == right


@pytest.mark.parametrize("label", [4, -1, "x", None, []])
def test_a_target_that_is_no_choice_is_refused_with_its_row(written, toy_model, label):
    with pytest.raises(InputError, match=r"t\.jsonl, row 1"):
        states_of(written(CHOICES, [{"q": "?", "c": ["a", "b"], "a": label}]), toy_model)


# --- answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "answers", "wanted"),
    [
        ([{"function": "regex", "regex_pattern": r"(\d+)", "group_select": -1}], ["1 or 12."], ["12"]),
        ([{"function": "regex", "regex_pattern": r"(a)|(b)"}], ["xb", "no"], ["b", "[invalid]"]),
        ([{"function": "regex"}], ["so #### 1,234"], ["1,234"]),
        ([{"function": "regex", "regex_pattern": "(x)", "fallback": "?", "group_select": 2}], ["x"], ["?"]),
        ([{"function": "take_first"}], ["a", "b"], ["a"]),
        ([{"function": "take_first_k", "k": 2}, {"function": "uppercase"}], ["a", "b", "c"], ["A", "B"]),
        ([{"function": "lowercase"}, {"function": "majority_vote"}], ["b", "A", "a"], ["a"]),
        ([{"function": "remove_whitespace"}], ["  x ", "\ty"], [" x ", "\ty"]),
        ([{"function": "map", "mapping_dict": {"A": 1}, "default_value": "-"}], ["A", "B"], ["1", "-"]),
        (
            [{"function": "multi_choice_regex", "regex_pattern": r"(\([A-Z]\))", "ignore_case": True}],
            ["It is (B)", "clearly a RED ROPE", "Answer: A", "no"],
            ["(B)", "(B)", "(A)", "[invalid]"],
        ),
    ],
)  # fmt: skip
def test_filters_do_what_the_harness_documents(steps, answers, wanted):
    assert pipeline(steps)(answers, {"choices": ["blue bar", "red rope"]}) == wanted


def figures(path: str, model: ToyModel, *answers: str) -> dict[str, float | None]:
    spec, states = run_spec_of(path), states_of(path, model)
    done = Result(completions=tuple(Completion(text=each, tokens=(Token(each, -1.0),)) for each in answers))
    found = measure(spec, [replace(each, result=done) for each in states], model).stats
    return {each.name.name: each.mean for each in found}


def test_answers_are_filtered_before_they_are_judged(written, toy_model):
    rows = [{"q": "Say twelve.", "a": "12"}, {"q": "Say thirteen.", "a": "13"}]
    last = {"function": "regex", "regex_pattern": r"(\d+)", "group_select": -1}
    strict = {"name": "strict", "filter": [{"function": "regex"}, {"function": "take_first"}]}
    path = written(WORDS, rows, filter_list=[strict, {"name": "last", "filter": [last]}])
    found = figures(path, toy_model, "first 9, then 12")
    assert (found["exact_match,strict"], found["exact_match,last"]) == (0.0, 0.5)
    assert scenario_of(path).main_metric == "exact_match,strict"
    assert figures(written(WORDS, rows), toy_model, "first 9, then 12")["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("options", "answer", "right"),
    [
        ({}, "The Rope", 0.0),
        ({}, "the rope!", 1.0),
        ({}, " the rope!", 0.0),
        ({"ignore_case": True}, "THE rope!", 1.0),
        ({"ignore_punctuation": True}, "the rope", 1.0),
        ({"ignore_numbers": True}, "the 4 rope!".replace(" 4", "4"), 1.0),
        ({"regexes_to_ignore": ["^the "], "ignore_case": True, "ignore_punctuation": True}, "Rope", 1.0),
        ({"ignore_case": False}, "THE rope!", 0.0),
    ],
)
def test_a_metrics_options_say_what_does_not_count(written, toy_model, options, answer, right):
    path = written(WORDS, [{"q": "?", "a": "the rope!"}], metric_list=[{"metric": "exact_match"} | options])
    assert figures(path, toy_model, answer)["exact_match"] == right


def test_any_of_several_right_texts_counts(written, toy_model):
    path = written(WORDS, [{"q": "?", "a": ["rope", "bar"]}])
    assert figures(path, toy_model, "bar")["exact_match"] == 1.0


def test_generation_stops_where_the_task_says(written, toy_model):
    rows = [{"q": "?", "a": "b"}]
    default = states_of(written(WORDS, rows, fewshot_delimiter="\n--"), toy_model)[0].request
    assert (default.stop_sequences, default.max_tokens, default.temperature) == (("\n--",), 256, 0.0)
    how = {"until": ".", "max_new_tokens": 7, "do_sample": True, "temperature": 0.5}
    asked = states_of(written(WORDS, rows, generation_kwargs=how, repeats=3), toy_model)[0].request
    assert (asked.stop_sequences, asked.max_tokens, asked.temperature) == ((".",), 7, 0.5)
    assert asked.num_completions == 3
    greedy = written(WORDS, rows, generation_kwargs={"do_sample": False, "temperature": 0.5})
    assert states_of(greedy, toy_model)[0].request.temperature == 0.0


# --- what is refused --------------------------------------------------------------------------------------

REFUSED = {
    "process_docs": "f", "process_results": "f", "custom_dataset": "f", "use_prompt": "p",
    "doc_to_image": "i",
    "should_decontaminate": True, "target_delimeter": " ", "num_fewshot": "two", "repeats": 0,
    "gen_prefix": 3,
    "filter_list": [{"name": "x", "filter": [{"function": "regexp"}]}],
    "metric_list": [{"metric": "bleu"}], "fewshot_config": {"sampler": "balanced"}, "dataset_path": "squad",
    "generation_kwargs": {"top_p": 0.5}, "description": ["x"], "output_type": "loglikelihood",
    "dataset_kwargs": {"data_files": {"test": "t.jsonl"}, "field": "data"}, "test_split": None,
    "doc_to_text": None, "doc_to_target": None,
}  # fmt: skip
DEEPER = [
    ("filter_list", [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "("}]}]),
    ("filter_list", [{"name": "x", "filter": [{"function": "regex", "pattern": "x"}]}]),
    ("filter_list", [{"name": "x", "filter": [{"function": "take_first_k", "k": "2"}]}]),
    ("filter_list", "take_first"),
    ("metric_list", [{"metric": "exact_match", "ignore_space": True}]),
    ("metric_list", [{"metric": "exact_match", "ignore_case": "yes"}]),
    ("metric_list", [{"metric": "exact_match", "aggregation": "median"}]),
    ("metric_list", "exact_match"),
    ("generation_kwargs", {"until": 3}),
    ("generation_kwargs", {"do_sample": True}),
    ("generation_kwargs", {"max_gen_toks": "many"}),
    ("generation_kwargs", ["until"]),
    ("fewshot_config", {"sample": []}),
]


@pytest.mark.parametrize(("key", "value"), [*REFUSED.items(), *DEEPER])
def test_what_is_not_taken_over_is_refused_by_name(written, toy_model, key, value):
    path = written(WORDS, [{"q": "?", "a": "b"}], **{key: value})
    with pytest.raises(CapstanError, match=key if key != "output_type" else "loglikelihood"):
        states_of(path, toy_model)


def test_what_only_describes_a_task_is_taken(written, toy_model):
    path = written(WORDS, [{"q": "?", "a": "b"}], metadata={"version": 1}, tag=["x"], task_alias="w",
                   should_decontaminate=False, dataset_name=None)  # fmt: skip
    assert len(states_of(path, toy_model)) == 1


def test_a_task_includes_another(written, toy_model):
    path = Path(written(CHOICES, target_delimiter="\n"))
    own = path.with_name("own.yaml")
    own.write_text("include: task.yaml\ntask: own\ntarget_delimiter: '|'\n")
    assert states_of(str(own), toy_model)[0].request.prompt == "The capital of France is|Paris"
    assert run_spec_of(str(own)).name == "own"
    own.write_text("include: own.yaml\n")
    with pytest.raises(InputError, match="includes itself"):
        run_spec_of(str(own))
    own.write_text("include: base.yaml\n")
    with pytest.raises(InputError, match=r"base\.yaml cannot be read"):
        run_spec_of(str(own))


def test_a_text_to_be_scored_is_the_target(written, toy_model):
    path = written(WORDS, [{"q": "?", "a": "a great anchor"}], output_type="loglikelihood_rolling")
    (state,) = states_of(path, toy_model)
    assert state.request.prompt.endswith("a great anchor")
    assert "?" not in state.request.prompt


def test_an_empty_context_is_the_models_own_beginning(written, toy_model):
    assert toy_model.limits == Limits(max_sequence_length=399, max_request_length=400, prefix_token="<s>")
    state = states_of(written(CHOICES, doc_to_text=""), toy_model)[0]
    assert state.request.prompt == "<s> Paris"
