"""Texts with a label: IMDB, CivilComments, RAFT.

Source: HELM's scenarios of these names.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from capstan.errors import InputError, unknown_name
from capstan.evaluation.instances import TEST, TRAIN, VALID, Instance, correct
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario, passage_and_question
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."


def load_imdb(data: DataFolder, *, only_contrast: bool = False) -> list[Instance]:
    """Reviews of films. Contrast sets from `{test,dev}_{original,contrast}.tsv` where they are there.

    Differs: files are read in order of their names; HELM has them in an order that it pinned.
    """
    contrasts: dict[str, tuple[str, str]] = {}
    for part in ("test", "dev"):
        if data.exists(f"{part}_original.tsv"):
            contrasts |= _imdb_contrasts(data, part)
    instances = []
    for split, part in ((TRAIN, "train"), (VALID, "test")):
        for label, answer in (("pos", "Positive"), ("neg", "Negative")):
            folder = f"aclImdb/{part}/{label}"
            for name in data.names(folder, "one review a file (*.txt)"):
                text = data.text(f"{folder}/{name}").strip()
                other = contrasts.get(text)
                if only_contrast and split == VALID and other is None:
                    continue
                instances.append(
                    Instance(
                        input=text,
                        references=(correct(answer),),
                        split=VALID
                        if other
                        else split,  # contrast sets are evaluated wherever they come from
                        contrasts=((other[0], (correct(other[1]),)),) if other else (),
                    )
                )
    return instances


def _imdb_contrasts(data: DataFolder, part: str) -> dict[str, tuple[str, str]]:
    """Each original text with its variant and the variant's label."""

    def rows(name: str) -> list[list[str]]:
        return [line.strip().split("\t") for line in list(data.lines(name, "Sentiment⇥Text"))[1:]]

    pairs = zip(rows(f"{part}_original.tsv"), rows(f"{part}_contrast.tsv"), strict=True)
    return {text: (other, label) for (_, text), (label, other) in pairs}


def _imdb_spec(only_contrast: str | bool = False) -> RunSpec:
    only = str(only_contrast).lower() == "true"
    return RunSpec(
        name="imdb" + (":only_contrast=True" if only else ""),
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "imdb_scenario.IMDBScenario", args={"only_contrast": only}
        ),
        adapter_spec=asking.generation(input_noun="Passage", output_noun="Sentiment"),
        metric_specs=asking.exact_match() + asking.classification(),
        groups=("imdb",),
    )


DEMOGRAPHICS = ("all", "male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")


def load_civil_comments(data: DataFolder, *, demographic: str = "all") -> list[Instance]:
    """Comments, toxic or not, that mention a group of people."""
    if demographic not in DEMOGRAPHICS:
        raise unknown_name("demographic of civil_comments", demographic, DEMOGRAPHICS)
    splits = {"train": TRAIN, "val": VALID, "test": TEST}
    instances = []
    looks_like = "comment_text, toxicity, split and a column for each group"
    for row in data.records("all_data_with_identities.csv", looks_like):
        if demographic != "all" and not float(row[demographic] or 0) >= 0.5:
            continue
        toxic = float(row["toxicity"] or 0) >= 0.5
        # pandas, with which HELM reads it, takes an empty comment for "nan".
        text = passage_and_question(row["comment_text"] or "nan", "Is the passage above toxic?")
        instances.append(
            Instance(
                input=text,
                is_composed=True,
                references=(correct("True" if toxic else "False"),),
                split=splits[row["split"]],
                sub_split="toxic" if toxic else "non-toxic",
            )
        )
    return instances


def _civil_comments_spec(demographic: str = "all") -> RunSpec:
    return RunSpec(
        name=f"civil_comments:demographic={demographic}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "civil_comments_scenario.CivilCommentsScenario",
            args={"demographic": demographic},
        ),
        adapter_spec=asking.generation(input_noun="Passage", output_noun="Answer"),
        metric_specs=asking.exact_match() + asking.bias() + asking.classification(),
        groups=("civil_comments",),
    )


# Field order and instructions, shortened, for where RAFT's own settings file is not there.
RAFT_SUBSETS = (
    "ade_corpus_v2",
    "banking_77",
    "neurips_impact_statement_risks",
    "one_stop_english",
    "overruling",
    "semiconductor_org_types",
    "systematic_review_inclusion",
    "tai_safety_research",
    "terms_of_service",
    "tweet_eval_hate",
    "twitter_complaints",
)


def load_raft(data: DataFolder, *, subset: str) -> list[Instance]:
    """Fifty labelled texts, a fifth of them for training. The settings file gives the order of fields."""
    fields, _ = raft_settings(data, subset)
    name = f"data/{subset}/train.csv"
    rows = list(data.records(name, "the subset's fields, ID and Label"))
    order = np.random.default_rng(42).permutation(len(rows))
    num_test = int(np.ceil(0.8 * len(rows)))
    split_of = {**dict.fromkeys(order[num_test:], TRAIN), **dict.fromkeys(order[:num_test], TEST)}
    instances = []
    for index in [*order[num_test:], *order[:num_test]]:
        row = rows[index]
        missing = [field for field in fields if field not in row]
        if missing:
            raise InputError(f"{name} lacks the fields {', '.join(missing)}; it has {', '.join(row)}.")
        text = "\n".join(f"{field}: {row[field]}" for field in fields)
        instances.append(Instance(input=text, references=(correct(row["Label"]),), split=split_of[index]))
    return instances


def raft_settings(data: DataFolder, subset: str) -> tuple[list[str], str]:
    """The fields of a subset in order, and its instructions."""
    if subset not in RAFT_SUBSETS:
        raise unknown_name("subset of RAFT", subset, RAFT_SUBSETS)
    name = "prompt_construction_settings.json"
    first, second = list(data.jsonl(name, "two lines: fields by subset, instructions by subset"))[:2]
    fields: Mapping[str, Any] = first
    return list(fields[subset]), str(second[subset])


def _raft_spec(subset: str, instructions: str = "") -> RunSpec:
    return RunSpec(
        name=f"raft:subset={subset}",
        scenario_spec=ScenarioSpec(class_name=_HELM + "raft_scenario.RAFTScenario", args={"subset": subset}),
        adapter_spec=asking.generation(instructions=instructions, output_noun="Label", max_tokens=30),
        metric_specs=asking.exact_match() + asking.bias() + asking.classification(),
        groups=("raft",),
    )


SCENARIOS = (
    Scenario(
        name="imdb",
        folder="imdb",
        class_name=_HELM + "imdb_scenario.IMDBScenario",
        description="Reviews of films, positive or negative (Maas et al. 2011)",
        load=load_imdb,
        run_spec=_imdb_spec,
        main_metric="quasi_exact_match",
        main_split="valid",
        page="ai.stanford.edu/~amaas/data/sentiment; contrast sets: allenai/contrast-sets",
    ),
    Scenario(
        name="civil_comments",
        folder="civil_comments",
        class_name=_HELM + "civil_comments_scenario.CivilCommentsScenario",
        description="Toxic comments that mention groups of people (Borkan et al. 2019, WILDS)",
        load=load_civil_comments,
        run_spec=_civil_comments_spec,
        main_metric="quasi_exact_match",
        page="wilds.stanford.edu/datasets (CivilComments)",
    ),
    Scenario(
        name="raft",
        folder="raft",
        class_name=_HELM + "raft_scenario.RAFTScenario",
        description="Labels that people needed, with fifty examples (Alex et al. 2021)",
        load=load_raft,
        run_spec=_raft_spec,
        main_metric="quasi_exact_match",
        page="huggingface.co/datasets/ought/raft",
        hub="ought/raft:",
    ),
)
