"""Questions about texts: BoolQ, NarrativeQA, NaturalQuestions, QuAC.

Source: HELM's scenarios of these names; random draws are in its order.
"""

import html
import random
import re
from collections.abc import Mapping
from typing import Any

from capstan.errors import InputError, unknown_name
from capstan.evaluation.instances import TRAIN, VALID, Instance, correct
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario, passage_and_question, required
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."
_BOOLQ = '{"question", "title", "answer": true, "passage"} on each line'


def load_boolq(data: DataFolder, *, only_contrast: bool = False) -> list[Instance]:
    """Yes-no questions; contrast sets from `boolq_perturbed.json` where it is there."""
    contrasts = _boolq_contrasts(data) if data.exists("boolq_perturbed.json") else {}
    if only_contrast and not contrasts:
        data.path("boolq_perturbed.json", "contrast sets (allenai/contrast-sets)")
    instances = []
    for split, name in ((TRAIN, "train.jsonl"), (VALID, "dev.jsonl")):
        for row in data.jsonl(name, _BOOLQ):
            passage, question, answer = required(row, "passage", "question", "answer", where=name)
            sets = contrasts.get(question, ()) if split == VALID else ()
            if only_contrast and split == VALID and not sets:
                continue
            instances.append(
                Instance(
                    input=_boolq_text(passage, question),
                    is_composed=True,
                    references=(correct("Yes" if answer else "No"),),
                    split=split,
                    contrasts=tuple((_boolq_text(passage, other), (correct(said),)) for other, said in sets),
                )
            )
    return instances


def _boolq_text(passage: str, question: str) -> str:
    return passage_and_question(passage, question.strip().capitalize() + "?")


def _boolq_contrasts(data: DataFolder) -> Mapping[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for item in data.json("boolq_perturbed.json")["data"][1:]:  # the first is a description
        kept = [
            (other["perturbed_q"], "Yes" if other["answer"] == "TRUE" else "No")
            for other in item["perturbed_questions"]
            if other["perturbed_q"] and other["answer"] != item["answer"]
        ]
        if kept:
            found[item["question"]] = kept
    return found


def _boolq_spec(only_contrast: str | bool = False) -> RunSpec:
    only = str(only_contrast).lower() == "true"
    return RunSpec(
        name="boolq" + (":only_contrast=True" if only else ""),
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "boolq_scenario.BoolQScenario", args={"only_contrast": only}
        ),
        adapter_spec=asking.generation(input_noun="Passage", output_noun="Answer"),
        metric_specs=asking.exact_match() + asking.harms(),
        groups=("boolq",),
    )


def load_narrativeqa(data: DataFolder) -> list[Instance]:
    """Questions about summaries of stories, one of each document's, drawn."""
    draw, instances = random.Random(0), []
    summaries = "third_party/wikipedia/summaries.csv"
    texts = {row["document_id"]: row for row in data.records(summaries, "document_id,set,summary")}
    rows = list(data.records("qaps.csv", "document_id,set,question,answer1,answer2"))
    for split in ("train", "valid", "test"):
        by_document: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            if row["set"] == split:
                by_document.setdefault(row["document_id"], []).append(row)
        for document, questions in by_document.items():
            row = draw.choice(questions)
            if document not in texts:
                raise InputError(f"{data.folder / summaries} has no summary of {document}.")
            question = row["question"].strip()
            question = question if question.endswith("?") else question + "?"
            instances.append(
                Instance(
                    input=passage_and_question(texts[document]["summary"].strip(), question),
                    is_composed=True,
                    references=(correct(row["answer1"]), correct(row["answer2"])),
                    split=split,
                )
            )
    return instances


def _narrativeqa_spec() -> RunSpec:
    return RunSpec(
        name="narrative_qa",
        scenario_spec=ScenarioSpec(class_name=_HELM + "narrativeqa_scenario.NarrativeQAScenario"),
        adapter_spec=asking.generation(input_noun="Passage", output_noun="Answer", max_tokens=100),
        metric_specs=asking.open_ended() + asking.harms(),
        groups=("narrative_qa",),
    )


_NATURAL_MODES = ("closedbook", "openbook_longans", "openbook_wiki")


def load_natural_qa(data: DataFolder, *, mode: str) -> list[Instance]:
    """Questions that people asked a search engine; even rows are for training, odd ones are asked."""
    if mode not in _NATURAL_MODES:
        raise unknown_name("mode of natural_qa", mode, _NATURAL_MODES)
    draw, instances = random.Random(0), []
    for number in range(5):
        name = f"nq-dev-{number:02d}.jsonl"
        kept = 0
        for row in data.jsonl(name, "the simplified or full NaturalQuestions development rows"):
            if not any(each["short_answers"] for each in row["annotations"]):
                continue
            instances.append(_natural(row, mode, draw, is_train=kept % 2 == 0))
            kept += 1
    return instances


def _natural(row: Mapping[str, Any], mode: str, draw: random.Random, *, is_train: bool) -> Instance:
    page = row["document_html"].encode()
    short, long = [], []
    for each in row["annotations"]:
        whole = _cut(page, each["long_answer"])
        for answer in each["short_answers"]:
            short.append(_cut(page, answer))
            long.append(whole)
    question = row["question_text"].capitalize()
    question = question if question.endswith("?") else question + "?"
    chosen = draw.randint(0, len(short) - 1)
    text = question
    if mode == "openbook_longans":
        text = passage_and_question(long[chosen], question, separator="\n\n", prefix="Passage: ")
    elif mode == "openbook_wiki":
        words = " ".join(_natural_token(token["token"]) for token in row["document_tokens"])
        prefix = f"Title: {row['document_title']}\n\nPassage: "
        text = passage_and_question(words, question, separator="\n\n", prefix=prefix)
    answers = [short[chosen]] if is_train else list(dict.fromkeys(short))
    return Instance(
        input=text,
        references=tuple(map(correct, answers)),
        split=TRAIN if is_train else VALID,
        is_composed=mode != "closedbook",
    )


def _cut(page: bytes, part: Mapping[str, int]) -> str:
    text = page[part["start_byte"] : part["end_byte"]].replace(b"\xc2\xa0", b" ").decode()
    return re.sub("<([^>]*)>", "", html.unescape(text))


def _natural_token(token: str) -> str:
    return re.sub("<([^>]*)>", "", html.unescape(token.replace(" ", "_")))


def _natural_qa_spec(mode: str) -> RunSpec:
    return RunSpec(
        name=f"natural_qa:mode={mode}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "natural_qa_scenario.NaturalQAScenario", args={"mode": mode}
        ),
        adapter_spec=asking.generation(
            input_noun="Question" if mode == "closedbook" else None, output_noun="Answer", max_tokens=300
        ),
        metric_specs=asking.f1() + asking.harms(),
        groups=(f"natural_qa_{mode}",),
    )


_END = " CANNOTANSWER"


def load_quac(data: DataFolder) -> list[Instance]:
    """Dialogues about a text, asked at a place drawn. As in HELM the turn before the question is left out."""
    draw, instances = random.Random(0), []
    for split, name in ((TRAIN, "train_v0.2.json"), (VALID, "val_v0.2.json")):
        for row in data.json(name, 'QuAC: {"data": [{"title", "background", "paragraphs"}]}')["data"]:
            text, answers = _dialogue(row, draw, name)
            instances.append(Instance(input=text, references=tuple(map(correct, answers)), split=split))
    return instances


def _dialogue(row: Mapping[str, Any], draw: random.Random, where: str) -> tuple[str, list[str]]:
    passage = row["paragraphs"][0]
    if not passage["context"].endswith(_END):
        raise InputError(f"{where}: the text of {row['title']!r} does not end with {_END!r}.")
    questions = passage["qas"]
    place = draw.randint(3, len(questions)) - 1
    text = f"Title: {row['title']}\n\nBackground: {row['background']}\n\nSection: {row['section_title']}\n"
    text += f"Passage: {passage['context'][: -len(_END)]}\n\n"
    for turn in questions[: place - 1]:
        text += f"Question: {turn['question']}\nAnswer: {turn['orig_answer']['text']}\n\n"
    answers = list(dict.fromkeys(answer["text"] for answer in questions[place]["answers"]))
    if answers == ["CANNOTANSWER"]:
        answers += ["Not enough information", "Cannot answer", "Do not know"]
    return text + f"Question: {questions[place]['question']}", answers


def _quac_spec() -> RunSpec:
    return RunSpec(
        name="quac",
        scenario_spec=ScenarioSpec(class_name=_HELM + "quac_scenario.QuACScenario"),
        adapter_spec=asking.generation(output_noun="Answer", max_tokens=100),
        metric_specs=asking.f1() + asking.harms(),
        groups=("quac",),
    )


SCENARIOS = (
    Scenario(
        name="boolq",
        folder="boolq",
        class_name=_HELM + "boolq_scenario.BoolQScenario",
        description="Yes-no questions about passages (Clark et al. 2019)",
        load=load_boolq,
        run_spec=_boolq_spec,
        main_metric="quasi_exact_match",
        main_split="valid",
        page="huggingface.co/datasets/stanford-crfm/helm-scenarios; allenai/contrast-sets",
        hub="stanford-crfm/helm-scenarios:boolq/",
    ),
    Scenario(
        name="narrative_qa",
        folder="narrativeqa",
        class_name=_HELM + "narrativeqa_scenario.NarrativeQAScenario",
        description="Questions about summaries of books and films (Kočiský et al. 2018)",
        load=load_narrativeqa,
        run_spec=_narrativeqa_spec,
        main_metric="f1_score",
        page="github.com/deepmind/narrativeqa",
    ),
    Scenario(
        name="natural_qa",
        folder="natural_qa",
        class_name=_HELM + "natural_qa_scenario.NaturalQAScenario",
        description="Questions of search-engine users, with or without a text (Kwiatkowski et al. 2019)",
        load=load_natural_qa,
        run_spec=_natural_qa_spec,
        main_metric="f1_score",
        main_split="valid",
        page="ai.google.com/research/NaturalQuestions (v1.0/dev)",
    ),
    Scenario(
        name="quac",
        folder="quac",
        class_name=_HELM + "quac_scenario.QuACScenario",
        description="Questions in dialogue (Choi et al. 2018)",
        load=load_quac,
        run_spec=_quac_spec,
        main_metric="f1_score",
        main_split="valid",
        page="quac.ai",
    ),
)
