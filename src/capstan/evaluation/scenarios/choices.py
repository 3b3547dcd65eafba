"""Multiple choice: MMLU, HellaSwag, OpenbookQA, TruthfulQA, LSAT, LegalSupport, BLiMP, BBQ.

Source: HELM's scenarios of these names.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from capstan.errors import InputError, unknown_name
from capstan.evaluation.instances import CORRECT, TEST, TRAIN, VALID, Instance, Reference, choices, correct
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario, passage_and_question, required
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."
_LETTERS = "ABCDE"
_QUESTIONS = "The following are multiple choice questions (with answers)"


def load_mmlu(data: DataFolder, *, subject: str) -> list[Instance]:
    """Exam questions on a subject; `dev` is for training."""
    instances = []
    for folder, split in (("auxiliary_train", TRAIN), ("dev", TRAIN), ("val", VALID), ("test", TEST)):
        name = f"data/{folder}/{subject}_{folder}.csv"
        if folder != "test" and not data.exists(name):
            continue
        for number, row in enumerate(data.rows(name, "question,A,B,C,D,letter without a header"), start=1):
            if len(row) < 4 or row[-1] not in _LETTERS[: len(row) - 2]:
                raise InputError(
                    f"{name}, row {number}: wants question,A,B,C,D,letter; has {len(row)} fields."
                )
            question, *answers, letter = row
            right = answers[_LETTERS.index(letter)]
            instances.append(Instance(input=question, references=_equal_to(answers, right), split=split))
    return instances


def _equal_to(answers: Sequence[str], right: str) -> tuple[Reference, ...]:
    """Choices of which every one that reads like the right one is right, as in HELM."""
    return choices(list(answers), {at for at, answer in enumerate(answers) if answer == right})


def _mmlu_spec(subject: str, method: str = asking.JOINT) -> RunSpec:
    return RunSpec(
        name=f"mmlu:subject={subject},method={method}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "mmlu_scenario.MMLUScenario", args={"subject": subject}
        ),
        adapter_spec=asking.multiple_choice(
            method,
            instructions=f"{_QUESTIONS} about {subject.replace('_', ' ')}.",
            input_noun="Question",
        ),
        metric_specs=asking.exact_match(),
        groups=("mmlu",),
    )


def load_hellaswag(data: DataFolder) -> list[Instance]:
    """How a scene goes on, four ways."""
    instances = []
    for split, part in ((TRAIN, "train"), (VALID, "val")):
        name = f"hellaswag_{part}.jsonl"
        for row in data.jsonl(name, '{"activity_label", "ctx_a", "ctx_b", "endings", "label"} on each line'):
            label, first, second, endings, right = required(
                row, "activity_label", "ctx_a", "ctx_b", "endings", "label", where=name
            )
            second = second[:1].upper() + second[1:]
            references = _equal_to(endings, endings[int(right)])
            instances.append(Instance(input=f"{label}: {first} {second}", references=references, split=split))
    return instances


def load_openbookqa(data: DataFolder) -> list[Instance]:
    """Elementary science with common sense."""
    instances = []
    for split in (TRAIN, TEST):
        name = f"OpenBookQA-V1-Sep2018/Data/Main/{split}.jsonl"
        for row in data.jsonl(name, '{"question": {"stem", "choices"}, "answerKey"} on each line'):
            question, key = required(row, "question", "answerKey", where=name)
            answers = [choice["text"] for choice in question["choices"]]
            references = _equal_to(answers, answers[_LETTERS.index(key)])
            instances.append(Instance(input=question["stem"], references=references, split=split))
    return instances


_COMMONSENSE = {"hellaswag": "HellaSwagScenario", "openbookqa": "OpenBookQA"}


def _commonsense_spec(dataset: str, method: str) -> RunSpec:
    if dataset not in _COMMONSENSE:
        raise unknown_name("commonsense data set", dataset, _COMMONSENSE)
    return RunSpec(
        name=f"commonsense:dataset={dataset},method={method}",
        scenario_spec=ScenarioSpec(class_name=f"{_HELM}commonsense_scenario.{_COMMONSENSE[dataset]}"),
        adapter_spec=asking.multiple_choice(
            method, instructions=f"{_QUESTIONS} about common sense.", input_noun="Question"
        ),
        metric_specs=asking.exact_match(),
        groups=(dataset,),
    )


def load_truthful_qa(data: DataFolder, *, task: str = "mc_single") -> list[Instance]:
    """Questions that many answer wrongly. Columns are found by name: newer files have one more."""
    if task != "mc_single":
        raise unknown_name("task of truthful_qa", task, ["mc_single"])
    rows = list(data.records("TruthfulQA.csv", "Type,Category,Question,Best Answer,…"))
    num_train = int(len(rows) * 0.2)
    instances = []
    for index, row in enumerate(rows):
        question, best, wrong = required(
            row, "Question", "Best Answer", "Incorrect Answers", where="TruthfulQA.csv"
        )
        best = _with_stop(best)
        references = [Reference(text=_with_stop(each)) for each in wrong.split(";") if each.strip()]
        references.append(correct(best))
        turn = ord(best[0]) % len(references)
        instances.append(
            Instance(
                input=question.strip(),
                references=tuple(references[turn:] + references[:turn]),
                split=TRAIN if index < num_train else VALID,
            )
        )
    return instances


def _with_stop(text: str) -> str:
    text = text.strip()
    return text if text.endswith(".") else text + "."


def _truthful_qa_spec(task: str = "mc_single", method: str = asking.JOINT) -> RunSpec:
    return RunSpec(
        name=f"truthful_qa:task={task},method={method}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "truthful_qa_scenario.TruthfulQAScenario", args={"task": task}
        ),
        adapter_spec=asking.multiple_choice(method, input_noun="Question"),
        metric_specs=asking.exact_match(),
        groups=("truthful_qa",),
    )


_LSAT_KINDS = {
    "in/out grouping": "grouping",
    "distribution grouping": "grouping",
    "simple ordering": "ordering",
    "relative ordering": "ordering",
    "complex ordering": "ordering",
    "determined assignment": "assignment",
    "undetermined assignment": "assignment",
}
_LSAT_TASKS = ("all", "grouping", "ordering", "assignment", "miscellaneous")


def load_lsat_qa(data: DataFolder, *, task: str = "all") -> list[Instance]:
    """Analytical reasoning of law-school admission tests."""
    if task not in _LSAT_TASKS:
        raise unknown_name("task of lsat_qa", task, _LSAT_TASKS)
    instances = []
    for part, split in (("Training", TRAIN), ("Development", VALID), ("Test", TEST)):
        for passage in data.json(f"AR_{part}Data.json", 'AR-LSAT: [{"passage", "questions"}]'):
            for question in passage["questions"]:
                kind = question["tags"][2].replace("grouping (distribution)", "distribution grouping")
                kinds = {kind.replace(" ", "_").replace("/", "_") or "miscellaneous", _LSAT_KINDS.get(kind)}
                if task != "all" and task not in kinds:
                    continue
                right = _LETTERS.index(question["answer"])
                text = passage_and_question(passage["passage"], question["question"])
                references = choices(question["options"], right)
                instances.append(Instance(input=text, references=references, split=split, is_composed=True))
    return instances


def _lsat_qa_spec(task: str = "all", method: str = asking.JOINT) -> RunSpec:
    return RunSpec(
        name=f"lsat_qa:task={task},method={method}",
        scenario_spec=ScenarioSpec(class_name=_HELM + "lsat_qa_scenario.LSATScenario", args={"task": task}),
        adapter_spec=asking.multiple_choice(method, instructions=f"{_QUESTIONS}.", input_noun="Passage"),
        metric_specs=asking.exact_match(),
        groups=("lsat_qa",),
    )


def load_legal_support(data: DataFolder) -> list[Instance]:
    """Which of two citations supports an argument."""
    instances = []
    for part, split in (("train", TRAIN), ("dev", VALID), ("test", TEST)):
        name = f"{part}.jsonl"
        looks_like = '{"context", "citation_a", "citation_b", "label"} on each line'
        for row in data.jsonl(name, looks_like):
            context, a, b, label = required(row, "context", "citation_a", "citation_b", "label", where=name)
            answers = [a["parenthetical"], b["parenthetical"]]
            references = _equal_to(answers, answers["ab".index(label)])
            instances.append(Instance(input=context, references=references, split=split))
    return instances


def _legal_support_spec(method: str = asking.JOINT) -> RunSpec:
    return RunSpec(
        name=f"legal_support,method={method}",
        scenario_spec=ScenarioSpec(class_name=_HELM + "legal_support_scenario.LegalSupportScenario"),
        adapter_spec=asking.multiple_choice(
            method,
            instructions="Which statement best supports the passage?",
            input_noun="Passage",
            max_train_instances=3,
        ),
        metric_specs=asking.exact_match(),
        groups=("legal_support",),
    )


_BLIMP: Mapping[str, tuple[str, ...]] = {
    "island_effects": (
        "left_branch_island_simple_question",
        "sentential_subject_island",
        "wh_island",
        "coordinate_structure_constraint_object_extraction",
        "coordinate_structure_constraint_complex_left_branch",
        "adjunct_island",
        "complex_NP_island",
        "left_branch_island_echo_question",
    ),
    "anaphor_agreement": ("anaphor_gender_agreement", "anaphor_number_agreement"),
    "argument_structure": (
        "animate_subject_passive",
        "animate_subject_trans",
        "transitive",
        "passive_1",
        "intransitive",
        "passive_2",
        "causative",
        "drop_argument",
        "inchoative",
    ),
    "determiner_noun_agreement": (
        "determiner_noun_agreement_with_adj_irregular_2",
        "determiner_noun_agreement_1",
        "determiner_noun_agreement_with_adj_irregular_1",
        "determiner_noun_agreement_irregular_1",
        "determiner_noun_agreement_irregular_2",
        "determiner_noun_agreement_with_adjective_1",
        "determiner_noun_agreement_2",
        "determiner_noun_agreement_with_adj_2",
    ),
    "subject_verb_agreement": (
        "distractor_agreement_relative_clause",
        "irregular_plural_subject_verb_agreement_2",
        "irregular_plural_subject_verb_agreement_1",
        "regular_plural_subject_verb_agreement_1",
        "distractor_agreement_relational_noun",
        "regular_plural_subject_verb_agreement_2",
    ),
    "ellipsis": ("ellipsis_n_bar_1", "ellipsis_n_bar_2"),
    "control_raising": (
        "expletive_it_object_raising",
        "tough_vs_raising_1",
        "existential_there_subject_raising",
        "tough_vs_raising_2",
        "existential_there_object_raising",
    ),
    "quantifiers": (
        "existential_there_quantifiers_1",
        "superlative_quantifiers_1",
        "superlative_quantifiers_2",
        "existential_there_quantifiers_2",
    ),
    "irregular_forms": ("irregular_past_participle_verbs", "irregular_past_participle_adjectives"),
    "npi_licensing": (
        "sentential_negation_npi_licensor_present",
        "matrix_question_npi_licensor_present",
        "sentential_negation_npi_scope",
        "only_npi_licensor_present",
        "only_npi_scope",
        "npi_present_2",
        "npi_present_1",
    ),
    "binding": (
        "principle_A_domain_2",
        "principle_A_domain_3",
        "principle_A_case_1",
        "principle_A_case_2",
        "principle_A_reconstruction",
        "principle_A_c_command",
        "principle_A_domain_1",
    ),
    "filler_gap_dependency": (
        "wh_vs_that_with_gap",
        "wh_vs_that_no_gap",
        "wh_questions_object_gap",
        "wh_vs_that_no_gap_long_distance",
        "wh_questions_subject_gap",
        "wh_questions_subject_gap_long_distance",
        "wh_vs_that_with_gap_long_distance",
    ),
}
PARADIGMS = frozenset(name for names in _BLIMP.values() for name in names)


def load_blimp(data: DataFolder, *, phenomenon: str) -> list[Instance]:
    """Pairs of a grammatical sentence and one that is not. `phenomenon` is HELM's, or one paradigm."""
    if phenomenon not in _BLIMP and phenomenon not in PARADIGMS:
        raise unknown_name("phenomenon of BLiMP", phenomenon, [*_BLIMP, *PARADIGMS])
    instances = []
    for paradigm in _BLIMP.get(phenomenon, (phenomenon,)):
        name = f"{paradigm}.jsonl"
        name = name if data.exists(name) else f"data/{name}"
        for row in data.jsonl(name, '{"sentence_good", "sentence_bad"} on each line'):
            good, bad = required(row, "sentence_good", "sentence_bad", where=name)
            instances.append(Instance(input="", references=choices([good, bad], 0), split=TEST))
    return instances


def _blimp_spec(phenomenon: str, method: str = asking.ORIGINAL) -> RunSpec:
    return RunSpec(
        name=f"blimp:phenomenon={phenomenon},method={method}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "blimp_scenario.BLiMPScenario", args={"phenomenon": phenomenon}
        ),
        adapter_spec=asking.multiple_choice(
            method, instructions="Please select the grammatical sentence.", empty_input=True
        ),
        metric_specs=asking.exact_match(),
        groups=("blimp",),
    )


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
        name="mmlu",
        folder="mmlu",
        class_name=_HELM + "mmlu_scenario.MMLUScenario",
        description="Exam questions of 57 subjects (Hendrycks et al. 2021)",
        load=load_mmlu,
        run_spec=_mmlu_spec,
        main_metric="exact_match",
        page="people.eecs.berkeley.edu/~hendrycks/data.tar",
    ),
    Scenario(
        name="commonsense",
        folder="hellaswag",
        class_name=_HELM + "commonsense_scenario.HellaSwagScenario",
        description="How a scene goes on (Zellers et al. 2019)",
        load=load_hellaswag,
        run_spec=_commonsense_spec,
        main_metric="exact_match",
        main_split="valid",
        page="github.com/rowanz/hellaswag",
    ),
    Scenario(
        name="commonsense",
        folder="openbookqa",
        class_name=_HELM + "commonsense_scenario.OpenBookQA",
        description="Elementary science with common sense (Mihaylov et al. 2018)",
        load=load_openbookqa,
        run_spec=_commonsense_spec,
        main_metric="exact_match",
        page="allenai.org/data/open-book-qa",
    ),
    Scenario(
        name="truthful_qa",
        folder="truthful_qa",
        class_name=_HELM + "truthful_qa_scenario.TruthfulQAScenario",
        description="Questions that many answer wrongly (Lin et al. 2022)",
        load=load_truthful_qa,
        run_spec=_truthful_qa_spec,
        main_metric="exact_match",
        main_split="valid",
        page="github.com/sylinrl/TruthfulQA",
    ),
    Scenario(
        name="lsat_qa",
        folder="lsat_qa",
        class_name=_HELM + "lsat_qa_scenario.LSATScenario",
        description="Analytical reasoning for law school (Zhong et al. 2021)",
        load=load_lsat_qa,
        run_spec=_lsat_qa_spec,
        main_metric="quasi_exact_match",
        page="github.com/zhongwanjun/AR-LSAT",
    ),
    Scenario(
        name="legal_support",
        folder="legal_support",
        class_name=_HELM + "legal_support_scenario.LegalSupportScenario",
        description="Which citation supports an argument (HELM)",
        load=load_legal_support,
        run_spec=_legal_support_spec,
        main_metric="quasi_exact_match",
        page="crfm.stanford.edu/helm (legal_support.zip)",
    ),
    Scenario(
        name="blimp",
        folder="blimp",
        class_name=_HELM + "blimp_scenario.BLiMPScenario",
        description="Minimal pairs of English grammar (Warstadt et al. 2020)",
        load=load_blimp,
        run_spec=_blimp_spec,
        main_metric="exact_match",
        page="github.com/alexwarstadt/blimp",
    ),
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
