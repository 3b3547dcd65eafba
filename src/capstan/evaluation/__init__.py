"""evaluation: what can a model do, and what does a relaxation cost? (HELM)

Scenarios × adapters × seven metric families, over any model that fits a small protocol.

    with AnswerStore(folder / "answers.jsonl") as store:
        evaluator = Evaluator(model=model, store=store, root=Path("data"))
        evaluated = evaluator.run(run_spec_of("gsm:max_eval_instances=100"))
    write_run(evaluated, folder / "runs" / "mine")
"""

from capstan.evaluation.adapters import RequestState, adapt
from capstan.evaluation.answer_store import AnswerStore
from capstan.evaluation.comparison import Difference, compare_folders
from capstan.evaluation.instances import Instance, PerturbationDescription, Reference
from capstan.evaluation.intervals import Interval, bootstrap
from capstan.evaluation.metrics import Measurement, Stat, StatName
from capstan.evaluation.models import (
    Completion,
    LanguageModel,
    Limits,
    Pair,
    Request,
    Result,
    Scored,
    Token,
)
from capstan.evaluation.perturbations import Perturbation
from capstan.evaluation.run_folder import (
    GroupOfRuns,
    group_reports,
    read_run,
    require_own_folder,
    write_groups,
    write_run,
)
from capstan.evaluation.running import Evaluated, Evaluator, answer, measure, prepare
from capstan.evaluation.scenarios import SCENARIOS, DataFolder, Scenario, run_spec_of
from capstan.evaluation.specs import AdapterSpec, Chat, MetricSpec, PerturbationSpec, RunSpec, ScenarioSpec
from capstan.evaluation.suites import SUITES, suite_entries

__all__ = [
    "SCENARIOS",
    "SUITES",
    "AdapterSpec",
    "AnswerStore",
    "Chat",
    "Completion",
    "DataFolder",
    "Difference",
    "Evaluated",
    "Evaluator",
    "GroupOfRuns",
    "Instance",
    "Interval",
    "LanguageModel",
    "Limits",
    "Measurement",
    "MetricSpec",
    "Pair",
    "Perturbation",
    "PerturbationDescription",
    "PerturbationSpec",
    "Reference",
    "Request",
    "RequestState",
    "Result",
    "RunSpec",
    "Scenario",
    "ScenarioSpec",
    "Scored",
    "Stat",
    "StatName",
    "Token",
    "adapt",
    "answer",
    "bootstrap",
    "compare_folders",
    "group_reports",
    "measure",
    "prepare",
    "read_run",
    "require_own_folder",
    "run_spec_of",
    "suite_entries",
    "write_groups",
    "write_run",
]
