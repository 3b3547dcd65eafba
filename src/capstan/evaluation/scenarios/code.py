"""Programs to write: functions to complete (HumanEval), problems with cases (APPS).

Source: HELM, `scenarios/code_scenario.py`; Chen et al. 2021 (arXiv 2107.03374); Hendrycks et al. 2021
(arXiv 2105.09938).
"""

import sys

from capstan.errors import unknown_name
from capstan.evaluation.instances import CORRECT, TEST, TRAIN, Instance, Reference
from capstan.evaluation.metrics.code import APPS_MEASURES
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario, required
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."
_CODE = ("humaneval", "apps")


def load_code(data: DataFolder, *, dataset: str) -> list[Instance]:
    """Functions to complete with their tests (HumanEval), or problems with cases (APPS)."""
    if dataset not in _CODE:
        raise unknown_name("data set of code", dataset, _CODE)
    return _humaneval(data) if dataset == "humaneval" else _apps(data)


def _humaneval(data: DataFolder) -> list[Instance]:
    name = "HumanEval.jsonl"
    instances = []
    for row in data.jsonl(name, '{"task_id", "prompt", "canonical_solution", "test"} on each line'):
        prompt, solution = required(row, "prompt", "canonical_solution", where=name)
        reference = Reference(text=solution, tags=(CORRECT,), test_cases=row)
        instances.append(Instance(input=prompt, references=(reference,), split=TEST))
    return instances


_LONGEST = 150_000  # characters of a question or solution, as the authors cut them
_LONGEST_INTEGER = 100_000  # digits: tests of APPS have integers that Python else refuses to read
_PINNED_ORDER = "APPS/code_scenario_apps_pinned_file_order.json"


def _apps(data: DataFolder) -> list[Instance]:
    """Problems in HELM's order: of `APPS/code_scenario_apps_pinned_file_order.json`, else by name."""
    instances = []
    sys.set_int_max_str_digits(max(sys.get_int_max_str_digits(), _LONGEST_INTEGER))
    pinned = data.json(_PINNED_ORDER) if data.exists(_PINNED_ORDER) else {}
    for split in (TRAIN, TEST):
        for name in pinned.get(split) or sorted(data.names(f"APPS/{split}", "a folder for each problem")):
            base = f"APPS/{split}/{name}"
            needed = "solutions.json" if split == TRAIN else "input_output.json"
            if not (data.exists(f"{base}/question.txt") and data.exists(f"{base}/{needed}")):
                continue
            has_start = data.exists(f"{base}/starter_code.py")
            start = data.text(f"{base}/starter_code.py") if has_start else ""
            solutions = data.json(f"{base}/solutions.json") if data.exists(f"{base}/solutions.json") else []
            cases = data.json(f"{base}/input_output.json") if data.exists(f"{base}/input_output.json") else {}
            way = "Call-Based" if has_start else "Standard Input"
            question = data.text(f"{base}/question.txt")[:_LONGEST]
            text = (
                f"\nQUESTION:\n{question}\n{start[:_LONGEST]}\n\nUse {way} format\n\nANSWER in Python code:\n"
            )
            references = tuple(
                Reference(text=reindented(solution)[:_LONGEST], tags=(CORRECT,), test_cases=cases)
                for solution in solutions or [""]
            )
            instances.append(Instance(input=text, references=references, split=split))
    return instances


def reindented(program: str) -> str:
    """A program with a tab for each level of its indentation, as the authors of APPS show solutions.

    A level is what the first indented line begins with; what is left over stays as it is.
    """
    lines = [line.rstrip("\r") for line in program.removesuffix("\n").split("\n")] if program else []
    level, shown = "", []
    for line in lines:
        if not level and not line.isspace():
            # One tab makes it a file of tabs, whatever follows it.
            level = ("\t" if line.startswith("\t") else " ") * (len(line) - len(line.lstrip(" \t")))
        count = 0
        while level and line.startswith(level, count * len(level)):
            count += 1
        shown.append("\t" * count + line[count * len(level) :] + "\n")
    return "".join(shown)


def _code_spec(dataset: str, timeout: str | float = 3) -> RunSpec:
    if dataset == "humaneval":
        adapter = asking.completion(
            temperature=0.2, stop=("\nclass", "\ndef", "\nif", "\nprint"), max_tokens=600
        )
        measures = asking.basic("code_eval_acc", "pass")
    else:
        adapter = asking.completion(
            max_train_instances=2, temperature=0.2, stop=("'''", "---", '"""', "\n\n\n"), max_tokens=600
        )
        measures = (asking.metric("code_metrics.APPSMetric", names=[*APPS_MEASURES], timeout=float(timeout)),)
    return RunSpec(
        name=f"code:dataset={dataset}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "code_scenario.CodeScenario", args={"dataset": dataset}
        ),
        adapter_spec=adapter,
        metric_specs=measures + asking.harms(),
        groups=(f"code_{dataset}",),
    )


SCENARIOS = (
    Scenario(
        name="code",
        folder="code",
        class_name=_HELM + "code_scenario.CodeScenario",
        description="Programs (Chen et al. 2021, Hendrycks et al. 2021)",
        load=load_code,
        run_spec=_code_spec,
        main_metric="pass",
        shown_metrics=("test_avg", "strict_acc"),
        page="github.com/openai/human-eval and hendrycks/apps",
    ),
)
