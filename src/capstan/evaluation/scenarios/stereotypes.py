"""BBQ: questions with and without the facts, that stereotypes would answer.

Source: Parrish et al. 2022 (arXiv 2110.08193); HELM, `scenarios/bbq_scenario.py`.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from capstan.errors import unknown_name
from capstan.evaluation.instances import CORRECT, TEST, TRAIN, Instance, Reference
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario, passage_and_question
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."
_LETTERS = "ABCDE"
_QUESTIONS = "The following are multiple choice questions (with answers)"

_BBQ_CATEGORIES = (
    "Age",
    "Disability_status",
    "Gender_identity",
    "Nationality",
    "Physical_appearance",
    "Race_ethnicity",
    "Race_x_SES",
    "Race_x_gender",
    "Religion",
    "SES",
    "Sexual_orientation",
)
_BBQ_UNKNOWN = (
    "Cannot answer",
    "Can't be determined",
    "Cannot be determined",
    "Can't answer",
    "Not known",
    "Not enough info",
    "Not enough information",
    "Not answerable",
    "Undetermined",
    "Unknown",
)
_BBQ_TEST_SIZE = 1000


def load_bbq(data: DataFolder, *, subject: str = "all") -> list[Instance]:
    """Questions with and without the facts, shuffled; the last thousand are asked."""
    if subject != "all" and subject not in _BBQ_CATEGORIES:
        raise unknown_name("subject of BBQ", subject, ["all", *_BBQ_CATEGORIES])
    rows = [
        (row, category)
        for category in (_BBQ_CATEGORIES if subject == "all" else (subject,))
        for row in data.jsonl(f"{category}.jsonl", '{"context", "question", "ans0", …} on each line')
    ]
    random.Random(0).shuffle(rows)
    num_train = len(rows) - _BBQ_TEST_SIZE
    return [
        _bbq(row, category, TRAIN if index < num_train else TEST)
        for index, (row, category) in enumerate(rows)
    ]


def _bbq(row: Mapping[str, Any], category: str, split: str) -> Instance:
    answers = [row[f"ans{at}"] for at in range(3)]
    target = other = unknown = ""
    for at in range(3):
        info = row["answer_info"][f"ans{at}"]
        if any(each in info for each in _BBQ_UNKNOWN):
            unknown = _LETTERS[at]
        elif any(
            _bbq_names(group, info, category) for group in row["additional_metadata"]["stereotyped_groups"]
        ):
            target = _LETTERS[at]
        else:
            other = _LETTERS[at]
    tags = (
        "negative" if row["question_polarity"] == "neg" else "non-negative",
        "ambiguous" if row["context_condition"] == "ambig" else "non-ambiguous",
        _LETTERS[row["label"]],
        target,
        other,
        unknown,
    )
    right = answers[row["label"]]
    return Instance(
        input=passage_and_question(row["context"], row["question"]),
        is_composed=True,
        references=tuple(
            Reference(text=answer, tags=((CORRECT,) if answer == right else ()) + tags) for answer in answers
        ),
        split=split,
    )


def _bbq_names(group: str, info: Sequence[str], category: str) -> bool:
    """Whether an answer names a group; metadata and answers sometimes write it differently."""
    if group in info:
        return True
    if category == "Race_ethnicity" and group in ("Black", "African American", "Latino"):
        return any(group in each for each in info)
    if category == "SES" and group == "low SES":
        return any("lowSES" in each for each in info)
    # HELM's condition binds so that the last two kinds count in every category.
    kinds = [f"lowSES-M-{group}", f"lowSES-F-{group}"]
    kinds += [f"lowSES-{group}"] if category == "Race_x_SES" else []
    return any(kind in each for kind in kinds for each in info)


def _bbq_spec(subject: str = "all", method: str = asking.JOINT) -> RunSpec:
    return RunSpec(
        name=f"bbq:subject={subject},method={method}",
        scenario_spec=ScenarioSpec(class_name=_HELM + "bbq_scenario.BBQScenario", args={"subject": subject}),
        adapter_spec=asking.multiple_choice(method, instructions=f"{_QUESTIONS}.", input_noun="Passage"),
        metric_specs=(asking.metric("bbq_metrics.BBQMetric"), *asking.exact_match()),
        groups=("bbq",),
    )


SCENARIOS = (
    Scenario(
        name="bbq",
        folder="bbq",
        class_name=_HELM + "bbq_scenario.BBQScenario",
        description="Stereotypes in question answering (Parrish et al. 2022)",
        load=load_bbq,
        run_spec=_bbq_spec,
        main_metric="bbq_accuracy",
        page="github.com/nyu-mll/BBQ",
    ),
)
