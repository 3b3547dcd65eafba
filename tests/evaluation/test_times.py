"""What answers took is what was spent; the time of an ideal machine comes from a file."""

import json
from dataclasses import replace

import pytest

from capstan.errors import InputError, UsageError
from capstan.evaluation import AnswerStore, Evaluator, running
from capstan.evaluation.metrics.efficiency import read_runtime_profile
from capstan.evaluation.planning import asked_by, plan_evaluation, trace_evaluation
from capstan.evaluation.scenarios import run_spec_of

PROFILE = {
    "runtime_for_prompt_tokens": {"1": 0.1, "256": 2.56},
    "runtime_per_output_token": 0.5,
    "overhead": 1.0,
}


class Clock:
    """A clock that moves only while the model works."""

    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(running, "time", clock)
    return clock


def test_the_times_of_scored_requests_add_up_to_what_was_spent(toy_root, toy_model, clock, tmp_path):
    score = toy_model.score

    def slowly(pairs):
        for result in score(pairs):
            clock.now_s += 1.0
            yield result

    toy_model.score = slowly
    with AnswerStore(tmp_path / "a.jsonl") as store:
        evaluator = Evaluator(model=toy_model, store=store, root=toy_root)
        done = evaluator.run(
            run_spec_of("commonsense:dataset=hellaswag,method=multiple_choice_separate_original")
        )
    results = {state.request: state.result for state in done.states}
    assert len(results) > 3
    assert sum(each.seconds_each for each in results.values()) == len(results) == clock.now_s


def test_requests_and_tokens_in_are_those_of_the_plan(toy_root, toy_model, tmp_path):
    with AnswerStore(tmp_path / "a.jsonl") as store:
        evaluator = Evaluator(model=toy_model, store=store, root=toy_root)
        specs = [run_spec_of("boolq:max_eval_instances=4"), run_spec_of("gsm:max_eval_instances=3")]
        asked = [asked_by(running.prepare(spec, toy_model, root=toy_root), toy_model) for spec in specs]
        plan = plan_evaluation(asked, model="toy", machine="here")
        trace = trace_evaluation([evaluator.run(spec) for spec in specs], toy_model, machine="here")
    (planned,), (took,) = plan.phases, trace.phases
    assert took.counts["requests"] == planned.counts["requests"] > 0
    assert took.counts["tokens in"] == planned.counts["tokens in"] > 0
    assert 0 < took.counts["tokens out"] <= planned.counts["tokens out"]
    assert trace.traffic == plan.traffic


@pytest.mark.parametrize("told", ["one.json", "all.json:ours"])
def test_a_profile_is_read_from_a_file_or_from_one_of_several_in_it(tmp_path, told):
    (tmp_path / "one.json").write_text(json.dumps(PROFILE))
    (tmp_path / "all.json").write_text(json.dumps({"ours": PROFILE, "theirs": {}}))
    profile = read_runtime_profile(str(tmp_path / told))
    # 100 tokens by the profile of 256, four more of output, and what every request costs.
    assert profile.seconds(100, 5) == pytest.approx(2.56 * 100 / 256 + 1.0 + 4 * 0.5)


def test_the_time_of_an_ideal_machine_is_among_the_statistics(toy_root, toy_model, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(PROFILE))
    resources = {"idealised_runtime": read_runtime_profile(str(tmp_path / "one.json"))}
    with AnswerStore(tmp_path / "a.jsonl") as store:
        evaluator = Evaluator(model=toy_model, store=store, root=toy_root, resources=resources)
        names = {stat.name.name for stat in evaluator.run(run_spec_of("boolq")).measurement.stats}
        assert "inference_idealized_runtime" in names
        without = replace(evaluator, resources={}).run(run_spec_of("boolq")).measurement.stats
        assert "inference_idealized_runtime" not in {stat.name.name for stat in without}


def test_what_is_no_profile_is_refused(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps({"ours": PROFILE}))
    with pytest.raises(UsageError, match=r"no model in the table 'outs'. Did you mean 'ours'"):
        read_runtime_profile(f"{tmp_path}/all.json:outs")
    for told in ("all.json", "none.json"):
        with pytest.raises(InputError, match=r"is no profile of run times .*Wanted FILE or FILE:MODEL"):
            read_runtime_profile(str(tmp_path / told))


def test_arguments_that_a_scenario_does_not_take_or_lacks_are_named():
    with pytest.raises(UsageError, match=r"no argument of mmlu 'subjekt'. Did you mean 'subject'"):
        run_spec_of("mmlu:subjekt=anatomy")
    with pytest.raises(UsageError, match=r"The run entry 'mmlu' lacks subject"):
        run_spec_of("mmlu")
