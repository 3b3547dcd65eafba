"""Facts, stories and sums: WikiFact, bAbI, GSM8K, MATH.

Source: HELM's scenarios of these names.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from capstan.errors import UsageError, unknown_name
from capstan.evaluation.instances import TEST, TRAIN, VALID, Instance, correct
from capstan.evaluation.metrics.math_equivalence import boxed
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario, passage_and_question, required
from capstan.evaluation.specs import AdapterSpec, RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."

# Wikidata's properties and HELM's names for them.
_PROPERTIES = dict(
    pair.split(":")
    for pair in [
        "genre:P136",
        "instrument:P1303",
        "author:P50",
        "creator:P170",
        "composer:P86",
        "director:P57",
        "applies_to_jurisdiction:P1001",
        "overrules:P4006",
        "laws_applied:P3014",
        "repealed_by:P2568",
        "majority_opinion_by:P5826",
        "plaintiff:P1620",
        "defendant:P1591",
        "movement:P135",
        "influenced_by:P737",
        "member_of_political_party:P102",
        "diplomatic_relation:P530",
        "position_held:P39",
        "basic_form_of_government:P122",
        "office_held_by_head_of_state:P1906",
        "head_of_state:P35",
        "office_held_by_head_of_government:P1313",
        "head_of_government:P6",
        "shares_border_with:P47",
        "continent:P30",
        "capital:P36",
        "capital_of:P1376",
        "country:P17",
        "twinned_administrative_body:P190",
        "currency:P38",
        "central_bank:P1304",
        "subsidiary:P355",
        "stock_exchange:P414",
        "industry:P452",
        "statement_describes:P2384",
        "solved_by:P1136",
        "programming_language:P277",
        "file_extension:P1195",
        "number_of_processor_cores:P1141",
        "operating_system:P306",
        "measured_physical_quantity:P111",
        "recommended_unit_of_measurement:P8111",
        "atomic_number:P1086",
        "electron_configuration:P8000",
        "discoverer_or_inventor:P61",
        "time_of_discovery_or_invention:P575",
        "location_of_discovery:P189",
        "medical_condition_treated:P2175",
        "drug_or_therapy_used_for_treatment:P2176",
        "genetic_association:P2293",
        "therapeutic_area:P4044",
        "symptoms_and_signs:P780",
        "place_of_birth:P19",
        "place_of_death:P20",
        "subclass_of:P279",
        "official_language:P37",
        "position_played_on_team:P413",
        "member_of_sports_team:P54",
        "award_received:P166",
        "original_network:P449",
        "educated_at:P69",
        "named_after:P138",
        "original_language_of_film_or_TV_show:P364",
        "member_of:P463",
        "field_of_work:P101",
        "participating_team:P1923",
        "occupation:P106",
        "has_part:P527",
        "manufacturer:P176",
        "developer:P178",
        "country_of_citizenship:P27",
        "language_of_work_or_name:P407",
        "located_in_the_administrative_territorial_entity:P131",
        "languages_spoken_written_or_signed:P1412",
        "employer:P108",
        "record_label:P264",
        "location:P276",
        "work_location:P937",
        "religion:P140",
        "owned_by:P127",
        "native_language:P103",
        "instance_of:P31",
        "country_of_origin:P495",
        "headquarters_location:P159",
        "formation_location:P740",
        "part_of:P361",
    ]
)
_PROPERTIES["location_of_formation"] = _PROPERTIES.pop("formation_location")


def load_wikifact(data: DataFolder, *, subject: str) -> list[Instance]:
    """Facts to complete, of one relation."""
    if subject not in _PROPERTIES:
        raise unknown_name("relation of WikiFact", subject, _PROPERTIES)
    instances = []
    for name, split in (("train.jsonl", TRAIN), ("dev.jsonl", VALID), ("test.jsonl", TEST)):
        for row in data.jsonl(name, '{"property", "template", "result_names"} on each line'):
            wanted, text, names = required(row, "property", "template", "result_names", where=name)
            if wanted == _PROPERTIES[subject]:
                answers = [each.strip() for group in names for each in group]
                instances.append(Instance(input=text, references=tuple(map(correct, answers)), split=split))
    return instances


def _wikifact_spec(subject: str, k: str | int = 5) -> RunSpec:
    return RunSpec(
        name=f"wikifact:k={k},subject={subject}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "wikifact_scenario.WIKIFactScenario", args={"subject": subject}
        ),
        adapter_spec=asking.completion(
            output_prefix=" ",
            output_suffix="\n",
            max_train_instances=5,
            num_outputs=int(k),
            temperature=1.0,
            max_tokens=8,
            stop=("\n",),
        ),
        metric_specs=asking.exact_match() + asking.harms(),
        groups=("wikifact",),
    )


_DIRECTIONS = {"s": "south", "n": "north", "e": "east", "w": "west"}
_PATH_FINDING = 19


def load_babi_qa(data: DataFolder, *, task: str | int = "all") -> list[Instance]:
    """Stories in short sentences, asked about in between."""
    if str(task) != "all" and str(task) not in map(str, range(1, 21)):
        raise UsageError(f"bAbI has the tasks 1 to 20 and all, not {task!r}.")
    instances = []
    for each in range(1, 21) if str(task) == "all" else (int(task),):
        for part, split in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
            name = f"tasks_1-20_v1-2/en-valid/qa{each}_{part}.txt"
            story: list[str] = []
            for line in data.lines(name, "numbered sentences, questions with tab and answer"):
                number, _, sentence = line.partition(" ")
                story = [] if number == "1" else story
                if "?" not in sentence:
                    story.append(sentence)
                    continue
                question, answer = (part.strip() for part in sentence.split("\t")[:2])
                if each == _PATH_FINDING:
                    answer = " ".join(_DIRECTIONS[step] for step in answer.split(","))
                text = passage_and_question("".join(story), question, separator="")
                right = (correct(answer),)
                instances.append(Instance(input=text, references=right, split=split, is_composed=True))
    return instances


def _babi_qa_spec(task: str = "all") -> RunSpec:
    return RunSpec(
        name=f"babi_qa:task={task}",
        scenario_spec=ScenarioSpec(class_name=_HELM + "babi_qa_scenario.BabiQAScenario", args={"task": task}),
        adapter_spec=asking.generation(input_noun="Passage", output_noun="Answer"),
        metric_specs=asking.exact_match(),
        groups=("babi_qa",),
    )


def load_gsm(data: DataFolder) -> list[Instance]:
    """Sums in words with the way to their answer.

    Differs: where there is no `test.jsonl`, the last fifth of the training problems is asked.
    """
    parts = [(TRAIN, "train.jsonl")] + ([(TEST, "test.jsonl")] if data.exists("test.jsonl") else [])
    instances = []
    for split, name in parts:
        for row in data.jsonl(name, '{"question", "answer": "... #### 5"} on each line'):
            question, answer = required(row, "question", "answer", where=name)
            answer = answer.replace("####", "The answer is").replace("\n", " ") + "."
            instances.append(Instance(input=question, references=(correct(answer),), split=split))
    if len(parts) == 2:
        return instances
    num_train = len(instances) - len(instances) // 5
    rest = [
        Instance(input=each.input, references=each.references, split=TEST) for each in instances[num_train:]
    ]
    return instances[:num_train] + rest


_GSM_MEASURES = ("gsm8k_strict_match", "gsm8k_flexible_match")


def _gsm_spec() -> RunSpec:
    return RunSpec(
        name="gsm",
        scenario_spec=ScenarioSpec(class_name=_HELM + "gsm_scenario.GSM8KScenario"),
        adapter_spec=asking.generation(input_noun="Q", output_noun="A", max_tokens=400, stop=("\n\n",)),
        metric_specs=asking.of_generation("exact_match_indicator", "final_number_exact_match", *_GSM_MEASURES)
        + asking.harms(),
        groups=("gsm",),
    )


_SUBJECTS = {
    "number_theory": "Number Theory",
    "intermediate_algebra": "Intermediate Algebra",
    "algebra": "Algebra",
    "prealgebra": "Prealgebra",
    "geometry": "Geometry",
    "counting_and_probability": "Counting & Probability",
    "precalculus": "Precalculus",
}
# The examples with which the authors of MATH prompted GPT-3.
_OFFICIAL_EXAMPLES = (
    ("What is $\\left(\\frac{7}{8}\\right)^3 \\cdot \\left(\\frac{7}{8}\\right)^{-3}$?", "1"),
    (
        "In how many ways can 4 books be selected from a shelf of 6 books if the order in which the "
        "books are "
        "selected does not matter?",
        "15",
    ),
    ("Find the distance between the points $(2,1,-4)$ and $(5,8,-3).$", "\\sqrt{59}"),
    (
        "The faces of an octahedral die are labeled with digits $1$ through $8$. What is the "
        "probability, expressed "
        "as a common fraction, of rolling a sum of $15$ with a pair of such octahedral dice?",
        "\\frac{1}{32}",
    ),
    (
        "The first three terms of an arithmetic sequence are 1, 10 and 19, respectively. What is the "
        "value of the "
        "21st term?",
        "181",
    ),
    ("Calculate $6 \\cdot 8\\frac{1}{3}", "50"),
    (
        "When the binary number $100101110010_2$ is divided by 4, what is the remainder (give your "
        "answer in base "
        "10)?",
        "2",
    ),
    ("How many zeros are at the end of the product 25 $\\times$ 240?", "3"),
)


def load_math(
    data: DataFolder,
    *,
    subject: str,
    level: str | int,
    use_official_examples: bool = False,
    use_chain_of_thought: bool = False,
) -> list[Instance]:
    """Competition problems of a subject and level, from the folders `MATH/{train,test}/<subject>/*.json`.

    They are ordered by their text and shuffled as the `datasets` library does with seed 42, as in HELM.
    """
    if subject not in _SUBJECTS:
        raise unknown_name("subject of MATH", subject, _SUBJECTS)
    if use_official_examples and use_chain_of_thought:
        raise UsageError("The official examples of MATH have no chain of thought; ask for one of both.")
    instances = []
    for split in (TRAIN, TEST):
        if split == TRAIN and use_official_examples:
            pairs: Iterable[tuple[str, str | None]] = _OFFICIAL_EXAMPLES
        else:
            rows = [
                row
                for row in _math_rows(data, split)
                if row["type"] == _SUBJECTS[subject] and row["level"] == f"Level {level}"
            ]
            pairs = [
                (row["problem"], row["solution"] if use_chain_of_thought else boxed(row["solution"]))
                for row in rows
            ]
        for problem, answer in pairs:
            if answer is not None:
                instances.append(Instance(input=problem, references=(correct(answer),), split=split))
    return instances


def _math_rows(data: DataFolder, split: str) -> list[Mapping[str, str]]:
    rows = [
        data.json(f"MATH/{split}/{folder}/{name}")
        for folder in data.names(f"MATH/{split}", "a folder for each subject with one JSON a problem")
        for name in data.names(f"MATH/{split}/{folder}")
    ]
    rows.sort(key=lambda row: row["problem"])
    return [rows[at] for at in np.random.default_rng(42).permutation(len(rows))]


def _math_spec(
    subject: str, level: str, use_official_examples: str = "False", use_chain_of_thought: str = "False"
) -> RunSpec:
    official, thinks = (str(each).lower() == "true" for each in (use_official_examples, use_chain_of_thought))
    adapter = AdapterSpec(
        instructions="Given a mathematics problem, determine the answer. Simplify your answer as much as "
        "possible.\n",
        max_train_instances=8,
        num_outputs=1,
        temperature=0.0,
        stop_sequences=("###",) if thinks else ("$",),
        max_tokens=400 if thinks else 20,
        input_prefix="Problem: ",
        input_suffix="\n",
        output_prefix="Answer: " if thinks else "Answer: $",
        output_suffix="\n" if thinks else "$\n",
        instance_prefix="###\n",
    )
    return RunSpec(
        name=f"math:subject={subject},level={level},use_official_examples={official},"
        f"use_chain_of_thought={thinks}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "math_scenario.MATHScenario",
            args={
                "subject": subject,
                "level": level,
                "use_official_examples": official,
                "use_chain_of_thought": thinks,
            },
        ),
        adapter_spec=adapter,
        metric_specs=asking.basic("math_equiv_chain_of_thought" if thinks else "math_equiv") + asking.harms(),
        groups=("math_chain_of_thought" if thinks else "math_regular",),
    )


SCENARIOS = (
    Scenario(
        name="wikifact",
        folder="wikifact",
        class_name=_HELM + "wikifact_scenario.WIKIFactScenario",
        description="Facts of Wikidata to complete (HELM)",
        load=load_wikifact,
        run_spec=_wikifact_spec,
        main_metric="quasi_exact_match",
        page="crfm.stanford.edu/helm (wikifact)",
    ),
    Scenario(
        name="babi_qa",
        folder="babi_qa",
        class_name=_HELM + "babi_qa_scenario.BabiQAScenario",
        description="Stories and questions (Weston et al. 2015)",
        load=load_babi_qa,
        run_spec=_babi_qa_spec,
        main_metric="quasi_exact_match",
        page="research.facebook.com/downloads/babi",
    ),
    Scenario(
        name="gsm",
        folder="gsm8k",
        class_name=_HELM + "gsm_scenario.GSM8KScenario",
        description="Sums in words (Cobbe et al. 2021)",
        load=load_gsm,
        run_spec=_gsm_spec,
        main_metric="final_number_exact_match",
        shown_metrics=_GSM_MEASURES,
        page="github.com/openai/grade-school-math",
    ),
    Scenario(
        name="math",
        folder="math",
        class_name=_HELM + "math_scenario.MATHScenario",
        description="Competition mathematics (Hendrycks et al. 2021)",
        load=load_math,
        run_spec=_math_spec,
        main_metric="math_equiv",
        shown_metrics=("math_equiv_chain_of_thought",),
        page="people.eecs.berkeley.edu/~hendrycks/MATH.tar",
    ),
)
