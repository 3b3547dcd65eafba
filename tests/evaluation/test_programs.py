"""Programs that models write: right ones pass however their first line came; wrong and ended ones do not."""

from types import SimpleNamespace

import pytest

from capstan.evaluation import AnswerStore, Completion, Evaluator, Result, Token, run_spec_of
from capstan.evaluation.metrics.code import apps_stats, completed, is_same_output, passes
from capstan.evaluation.scenarios import scenario_of
from capstan.evaluation.scenarios.code import reindented

ADD = {
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "test": "def check(f):\n    assert f(1, 2) == 3\n",
    "entry_point": "add",
}
RUNS = SimpleNamespace(resources={"allow_code_execution": True})


@pytest.mark.parametrize(
    "answer",
    [
        "    return a + b\n", "return a + b", " return a + b", "c = a + b\n    return c",
        "\n\n    return a + b", "    c = a + b\n    return c\n\n\n",
        "for _ in 'x':\n        c = a + b\n    return c",
    ],
)  # fmt: skip
def test_a_right_program_passes_however_its_first_line_came(answer):
    assert passes(ADD, answer)


SAYS_THE_WORD_ITSELF = """import json, os
    os.write(2, json.load(open("told.json"))["word"].encode())
    os._exit(0)"""


@pytest.mark.parametrize(
    "answer",
    ["return a - b", "exit()", "import sys; sys.exit(0)", SAYS_THE_WORD_ITSELF, "a +", "", "\x00", "\ud800"],
)
def test_a_wrong_program_or_one_that_ends_itself_does_not_pass(answer):
    assert not passes(ADD, answer)


@pytest.mark.parametrize(
    ("prompt", "answer", "wanted"),
    [
        ("def f(x):\n\t'''Doc.'''\n", "return x", "\treturn x"),
        ("def f(x):\n  '''Doc.'''\n", "y = x\n  return y", "  y = x\n  return y"),
        ("def f(x):\n", "return x", "    return x"),
        ("def f(x):\n", "        y = x\n        return y\n", "        y = x\n        return y\n"),
        ("class A:\n    def f(self):\n        '''Doc.'''\n", "return 1", "        return 1"),
        ("def f(x):\n    '''Doc.\n  '''\n", "pass", "    pass"),
    ],
)  # fmt: skip
def test_the_first_line_gets_the_indentation_of_its_function(prompt, answer, wanted):
    assert completed(prompt, answer) == prompt + wanted


def test_a_program_may_begin_with_what_must_come_first():
    case = ADD | {"prompt": "from __future__ import annotations\n" + ADD["prompt"]}
    assert passes(case, "    return a + b")


def stats_of(cases, *answers):
    return {each.name.name: each.mean for each in apps_stats(RUNS, cases, *answers, timeout_s=2)}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("def mul(a, b):\n    return a * b\n", 1),
        ("class Solution:\n    def mul(self, a, b):\n        return a * b\n", 1),
        (
            "def mul(a, b):\n    return a * b\nif __name__ == '__main__':\n    print(input())\n",
            1,
        ),
        ("def mul(a, b):\n    return floor(a * b)\n", 1),
        ("def mul(a, b):\n    return int(np.prod([a, b]))\n", 1),
        ("def mul(a, b):\n    return a + b\n", 0),
        ("def mul(a):\n    return a\n", 0),
        ("def other(a, b):\n    return a * b\n", 0),
        ("exit()", 0),
    ],
)
def test_a_problem_that_names_a_function_calls_it(answer, right):
    found = stats_of({"fn_name": "mul", "inputs": [[2, 3]], "outputs": [6]}, answer)
    assert found == {"test_avg": right, "strict_acc": right}


@pytest.mark.parametrize(
    ("given", "answer", "wanted"),
    [
        ([[1, 2]], "def f(x):\n    return tuple(x)", [1, 2]),
        ([3], "def f(x):\n    return x", [3]),
        ([2], "def f(x):\n    return [(1, 2)] * x", [[[1, 2], [1, 2]]]),
        ([{"1": 5}], "def f(x):\n    return x[1]", 5),
        ([1], "def f(x):\n    return {x: 2}", {"1": 2}),
    ],
)  # fmt: skip
def test_what_a_function_gives_back_is_compared_as_json_tells_it(given, answer, wanted):
    assert stats_of({"fn_name": "f", "inputs": [given], "outputs": [wanted]}, answer)["strict_acc"] == 1


def test_programs_that_read_get_each_case_and_the_best_answer_counts():
    cases = {"inputs": ["3\n", ["4", "1"]], "outputs": ["9\n", ["16"]]}
    assert stats_of(cases, "print(int(input())**2)") == {"test_avg": 1, "strict_acc": 1}
    assert stats_of(cases, "print(9); exit()") == {"test_avg": 0.5, "strict_acc": 0}
    assert stats_of(cases, "print(9)", "print(int(input())**2)") == {"test_avg": 1, "strict_acc": 1}
    assert stats_of(cases, "if __name__ == '__main__':\n    print(int(input())**2)")["strict_acc"] == 1
    assert stats_of(cases, "while True: pass", "x")["test_avg"] == 0


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("1 2\n", "1 2", 1), ("  1 \n 2\n", "1\n2\n", 1), ("1\n\n2", "1\n2", 1), ("0.30000000001", "0.3", 1),
        ("b a", "a b", 1), ("2\n1", "1\n2", 1), ("1.0001 2", "1 2.0001", 1),
        ("1\n2", "1 2", 0), ("", "1", 0), ("a", "b", 0), ("1 2 3", "1 2", 0), ("0.31", "0.3", 0),
    ],
)  # fmt: skip
def test_printed_answers_are_judged_as_the_authors_do(found, wanted, same):
    assert is_same_output(found, wanted) == same


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("if x:\n  if y:\n    z\n", "if x:\n\tif y:\n\t\tz\n"),
        ("if x:\n    if y:\n        z", "if x:\n\tif y:\n\t\tz\n"),
        ("def f():\n\tif y:\n\t\tz\n", "def f():\n\tif y:\n\t\tz\n"),
        ("if x:\n    f(a,\n      b)\n", "if x:\n\tf(a,\n\t  b)\n"),
        ("x\n", "x\n"),
        ("   \nif x:\r\n  y\r\n", "   \nif x:\n\ty\n"),
        ("", ""),
    ],
)
def test_solutions_are_shown_with_a_tab_a_level(program, wanted):
    assert reindented(program) == wanted


class Says:
    """Answers every request alike, over a made-up model."""

    def __init__(self, model, text):
        self._model, self._text = model, text

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, requests):
        for at, _ in enumerate(requests):
            told = Completion(text=self._text, tokens=(Token(self._text, -1.0),), finish_reason="stop")
            yield at, Result(completions=(told,))


@pytest.mark.parametrize(
    ("entry", "answer", "metric"),
    [
        ("code:dataset=humaneval", "    return 2 * x\n", "pass"),
        ("code:dataset=apps", "print(input())", "test_avg"),
    ],
)
def test_runs_of_programs_show_their_own_main_metric(tmp_path, toy_root, toy_model, entry, answer, metric):
    resources = {"allow_code_execution": True}
    with AnswerStore(tmp_path / "a.jsonl") as store:
        model = Says(toy_model, answer)
        allowed = Evaluator(model=model, store=store, root=toy_root, resources=resources)
        done = allowed.run(run_spec_of(entry), scenario=scenario_of("code"))
        assert done.main_metric == metric
        assert next(s for s in done.measurement.stats if s.name.name == metric).mean == 1
        forbidden = Evaluator(model=model, store=store, root=toy_root).run(run_spec_of(entry))
    assert "programs were not run; --allow-code-execution runs them" in forbidden.notes
    assert metric not in {s.name.name for s in forbidden.measurement.stats}


def test_problems_of_apps_come_in_helms_order_with_solutions_reindented(toy_root):
    from capstan.evaluation.scenarios import load_instances

    instances = load_instances(run_spec_of("code:dataset=apps").scenario_spec, toy_root)
    test = [each for each in instances if each.split == "test"]
    # As the pinned order has them, which toy_data turns round.
    assert ["it 1." in test[0].input, "it 0." in test[1].input] == [True, True]
    assert test[0].references[0].text == "x = input()\nif x:\n\tprint(x)\n"
