"""Multiple choice: MMLU, HellaSwag, OpenbookQA, TruthfulQA, LSAT, LegalSupport.

Source: HELM's scenarios of these names.
"""

from collections.abc import Sequence

from capstan.errors import InputError, unknown_name
from capstan.evaluation.instances import TEST, TRAIN, VALID, Instance, Reference, choices, correct
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
)
