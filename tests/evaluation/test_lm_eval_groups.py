"""Groups of lm-evaluation-harness's tasks: what belongs to them, and their averages."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from capstan.errors import CapstanError
from capstan.evaluation import AnswerStore, Evaluator, GroupOfRuns, group_reports, run_spec_of
from capstan.evaluation.intervals import Interval
from capstan.evaluation.scenarios import TaskGroup, group_of, load_instances
from capstan.evaluation.scenarios.lm_eval_groups import Aggregate
from toy_model import ToyModel

TASK = {
    "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}",
    "doc_to_choice": ["yes", "no"], "doc_to_target": "a",
}  # fmt: skip


def data(name: str) -> dict[str, Any]:
    return {"dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks one (2 questions), two (6) and tagged (3); the last two in a folder below, tagged."""
    (tmp_path / "below").mkdir()
    for name, count, where in (("one", 2, "."), ("two", 6, "below"), ("tagged", 3, "below")):
        rows = "".join(json.dumps({"q": f"{name} {at}", "a": at % 2}) + "\n" for at in range(count))
        (tmp_path / where / f"{name}.jsonl").write_text(rows)
        told = {"task": name} | TASK | data(name) | ({"tag": ["low"]} if where == "below" else {})
        (tmp_path / where / f"{name}.yaml").write_text(yaml.safe_dump(told))
    (tmp_path / "code.yaml").write_text("task: other\ndoc_to_text: !function x.y\n")
    return tmp_path


def written(folder: Path, **told: Any) -> str:
    (folder / "g.yaml").write_text(yaml.safe_dump({"group": "g"} | told))
    return str(folder / "g.yaml")


def names(group: TaskGroup | None) -> list[str]:
    assert group is not None
    return [each.name for each in group.scenarios]


def test_a_group_holds_tasks_tags_groups_and_tasks_of_its_own(folder):
    inner = {"group": "inner", "task": ["two"]}
    own = {"task": "own"} | TASK | data("one")
    again = {"task": "one", "description": "About ropes: "}
    group = group_of(written(folder, task=[again, "low", inner, own], doc_to_choice=["so", "not so"]))
    assert names(group) == ["one", "tagged", "two", "own"]
    assert group is not None
    assert [each.name for each in group.all_groups] == ["g", "inner"]
    spec = run_spec_of(str(folder / "g.yaml"), scenario=group.scenarios[0])
    instances = load_instances(spec.scenario_spec, None, scenario=group.scenarios[0])
    assert instances[0].extra["description"] == "About ropes: "
    assert [each.text for each in instances[0].references] == ["so", "not so"]


def test_settings_of_an_entry_hold_for_each_task(folder, toy_model):
    path = written(folder, task=["one", "two"]) + ":max_eval_instances=1"
    group = group_of(path)
    assert group is not None
    specs = [run_spec_of(path, scenario=own) for own in group.scenarios]
    assert [spec.name for spec in specs] == ["one:max_eval_instances=1", "two:max_eval_instances=1"]
    assert {spec.adapter_spec.max_eval_instances for spec in specs} == {1}


FIGURES = {"one": Interval(0.5, 0.25, 0.75, 2), "two": Interval(1.0, 1.0, 1.0, 6)}


def test_an_average_is_weighted_by_size_unless_it_is_not():
    weighted, plain = (
        Aggregate(metric="acc").of(FIGURES),
        Aggregate(metric="acc", weight_by_size=False).of(FIGURES),
    )
    assert weighted is not None
    assert plain is not None
    assert weighted.mean == pytest.approx((2 * 0.5 + 6 * 1.0) / 8)
    assert plain.mean == pytest.approx(0.75)
    assert weighted.half_width == pytest.approx(2 * 0.25 / 8)
    assert plain.half_width == pytest.approx(0.25 / 2)
    assert Aggregate(metric="acc").of({}) is None


def test_averages_are_those_of_the_runs(folder, tmp_path, toy_model: ToyModel):
    path = written(folder, task=["one", "two"], aggregate_metric_list=[
        {"metric": "acc", "weight_by_size": True}, {"metric": "acc_norm", "weight_by_size": False},
        {"metric": "nothing"},
    ])  # fmt: skip
    group = group_of(path)
    assert group is not None
    with AnswerStore(tmp_path / "answers.jsonl") as store:
        evaluator = Evaluator(model=toy_model, store=store)
        done = [evaluator.run(own.run_spec(), scenario=own) for own in group.scenarios]
    (report,) = group_reports([GroupOfRuns(group=group, runs={"one": "one", "two": "two"})], done)

    def mean(at: int, name: str) -> float:
        return next(s.mean for s in done[at].measurement.stats if s.name.name == name)

    assert report["averages"]["acc"]["mean"] == pytest.approx((2 * mean(0, "acc") + 6 * mean(1, "acc")) / 8)
    assert report["averages"]["acc_norm"]["mean"] == pytest.approx(
        (mean(0, "acc_norm") + mean(1, "acc_norm")) / 2
    )
    assert report["averages"]["nothing"] is None


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"task": ["on"]}, "Did you mean 'one'"),
        ({"task": []}, "wants a list of tasks"),
        ({"task": [3]}, "not 3"),
        ({"task": ["g"]}, "contains itself"),
        ({"group": None, "task": ["one"]}, "needs the name of their group"),
        ({"task": ["one"], "colour": "red"}, "colour"),
        ({"task": ["one"], "aggregate_metric_list": [{"metric": "acc", "aggregation": "median"}]}, "median"),
        ({"task": ["one"], "aggregate_metric_list": [{"metric": "acc", "weight": True}]}, "weight"),
        (
            {"task": ["one"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": "no"}]},
            "weight_by_size",
        ),
        ({"task": ["one"], "aggregate_metric_list": ["acc"]}, "aggregate_metric_list"),
    ],
)
def test_what_is_wrong_with_a_group_is_named(folder, told, words):
    with pytest.raises(CapstanError, match=words):
        group_of(written(folder, **told))


def test_a_group_is_no_single_run_and_a_task_no_group(folder):
    with pytest.raises(CapstanError, match="is a group of tasks"):
        run_spec_of(written(folder, task=["one"]))
    assert group_of(str(folder / "one.yaml")) is None
    assert group_of("numeracy") is None
