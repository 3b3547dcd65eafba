"""Problems that are generated and need no data: patterns, rules in plain words, numbers.

Source: HELM, `scenarios/synthetic_reasoning_scenario.py` (LIME, Wu et al. 2021),
`synthetic_reasoning_natural_scenario.py`. Random draws
are in HELM's order, so problems are the same. `numeracy` is ours, after the paper's description.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capstan.errors import unknown_name
from capstan.evaluation.instances import TEST, TRAIN, VALID, Instance, correct
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."
_SEED = 42
_NUM_TRAIN, _NUM_VALID, _NUM_TEST = 1000, 5000, 5000


def _split(index: int) -> str:
    if index < _NUM_TRAIN:
        return TRAIN
    return VALID if index < _NUM_TRAIN + _NUM_VALID else TEST


# --- patterns ---------------------------------------------------------------------------------------------

_ANIMALS = [
    "zebra",
    "cobra",
    "stork",
    "penguin",
    "shark",
    "lion",
    "buffalo",
    "whale",
    "seal",
    "eagle",
    "horse",
    "rat",
]
_FRUITS = [
    "apple",
    "peach",
    "watermelon",
    "banana",
    "grape",
    "kiwi",
    "pear",
    "strawberry",
    "blueberry",
    "blackberry",
]
_MODES = ("variable_substitution", "pattern_match", "induction")


def load_synthetic_reasoning(_: DataFolder, *, mode: str) -> list[Instance]:
    """Patterns of symbols and what they become: match, substitute or find the pattern."""
    if mode not in _MODES:
        raise unknown_name("mode of synthetic_reasoning", mode, _MODES)
    draw = np.random.RandomState(_SEED)
    return [_pattern_problem(draw, mode, _split(at)) for at in range(_NUM_TRAIN + _NUM_VALID + _NUM_TEST)]


def _pattern_problem(draw: np.random.RandomState, mode: str, split: str) -> Instance:
    symbols = [str(each) for each in draw.choice(["X", "Y", "Z"], size=draw.randint(2, 4))]
    distinct = sorted(set(symbols))
    operators = [str(each) for each in draw.choice(["+", "-", "*", "="], size=draw.randint(2, 4))]
    pattern = _shuffled(draw, symbols + operators)
    words, told = _substitution(draw, distinct)
    result = " ".join(words.get(each, each) for each in pattern)
    others, _ = _substitution(draw, distinct)
    rule = " ".join(pattern)
    if mode == "induction":
        second = " ".join(others.get(each, each) for each in pattern)
        text, answer = f"Two results: {result} | {second}", f"Rule: {rule}"
    elif mode == "variable_substitution":
        text, answer = f"Rules: {rule} | Substitutions: {told}", result
    else:
        rules = [" ".join(_shuffled(draw, distinct + operators)) for _ in range(3)]
        text = f"Rules: {' | '.join(_shuffled(draw, [*rules, rule]))} | Result: {result}"
        answer = rule
    return Instance(input=text, references=(correct(answer),), split=split)


def _shuffled(draw: np.random.RandomState, items: Sequence[str]) -> list[str]:
    shuffled = list(items)
    draw.shuffle(shuffled)
    return shuffled


def _substitution(draw: np.random.RandomState, symbols: Sequence[str]) -> tuple[dict[str, str], str]:
    words = {}
    for symbol in symbols:
        length = draw.randint(1, 3)
        words[symbol] = " ".join(draw.choice(_ANIMALS + _FRUITS, size=length))
    return words, " , ".join(f'{symbol} by " {text} "' for symbol, text in words.items())


def _synthetic_reasoning_spec(mode: str) -> RunSpec:
    return RunSpec(
        name=f"synthetic_reasoning:mode={mode}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "synthetic_reasoning_scenario.SyntheticReasoningScenario", args={"mode": mode}
        ),
        adapter_spec=asking.generation(
            instructions="Please solve the following problem.", output_noun="Target", max_tokens=50
        ),
        metric_specs=asking.exact_match() + asking.harms(),
        groups=("synthetic_reasoning", f"synthetic_reasoning_{mode}"),
    )


# --- rules in plain words ---------------------------------------------------------------------------------

_SUBJECTS = {
    "person": ["Alice", "Bob", "Carol", "Dan", "Erin", "Frank"],
    "animal": [
        "dog",
        "cat",
        "rabbit",
        "mouse",
        "tiger",
        "lion",
        "bear",
        "squirrel",
        "cow",
        "panda",
        "hedgehog",
        "elephant",
        "giraffe",
        "hippo",
    ],
    "plant": ["poppy", "dandelion", "tree", "rose", "sunflower"],
}
_ATTRIBUTES = {
    line.split()[0]: line.split()
    for line in (
        "young",
        "soft",
        "sad",
        "scary",
        "cold chill cool",
        "hot warm",
        "smart clever wise intelligent",
        "clean tidy",
        "small little tiny",
        "big enormous giant huge",
        "good kind nice",
        "beautiful pretty",
        "red crimson",
        "blue cobalt",
        "green viridian",
        "purple violet",
        "boring dull",
        "old ancient antique",
        "strong powerful muscular",
        "weak frail fragile",
        "fast quick",
        "slow sluggish",
        "bad evil wicked mean",
        "happy elated glad cheerful",
        "round circular spherical",
    )
}


class _Rule(NamedTuple):
    """If a subject has one or all of some attributes, then it has another."""

    subject: str
    category: str
    attributes: list[str]
    needs: str
    then: str

    def applies(self, known: Sequence[str]) -> bool:
        if self.needs == "and":
            return set(self.attributes) <= set(known)
        return not set(self.attributes).isdisjoint(known)

    def __str__(self) -> str:
        condition = f" {self.needs} ".join(self.attributes)
        subject = _named(self.subject, self.category, "a")
        return (
            f"If {subject} is {condition}, then {_named(self.subject, self.category, 'the')} is {self.then}."
        )


def _named(subject: str, category: str, article: str, *, capital: bool = False) -> str:
    if category == "person" or subject == "person":
        return subject
    article = article if article == "the" else "an" if subject[0].lower() in "aeiou" else "a"
    return f"{article.capitalize() if capital else article} {subject}"


def _fact(subject: str, category: str, attributes: Sequence[str]) -> str:
    if not attributes:
        return "Nothing."
    return f"{_named(subject, category, 'the', capital=True)} is {' and '.join(attributes)}."


_DIFFICULTIES = ("easy", "medium", "hard")


def load_synthetic_reasoning_natural(_: DataFolder, *, difficulty: str) -> list[Instance]:
    """What follows from rules and a fact. Easy: about the subject itself; hard: with synonyms."""
    if difficulty not in _DIFFICULTIES:
        raise unknown_name("difficulty of synthetic_reasoning_natural", difficulty, _DIFFICULTIES)
    draw = random.Random(_SEED)
    return [_rule_problem(draw, difficulty, _split(at)) for at in range(_NUM_TRAIN + _NUM_VALID + _NUM_TEST)]


def _rule_problem(draw: random.Random, difficulty: str, split: str) -> Instance:
    category = draw.choice(list(_SUBJECTS))
    subject = draw.choice(_SUBJECTS[category])
    rules = _rules(draw, subject, category, always_subject=difficulty == "easy")
    general, specific, follows = _test(draw, rules)
    shown = specific if difficulty == "hard" else general
    text = "\n".join(map(str, rules)) + "\n"
    text += f"Fact:\n{_fact(subject, category, shown)}\n"
    text += f"The following can be determined about {_named(subject, category, 'the')}:"
    return Instance(input=text, references=(correct(_fact(subject, category, follows)),), split=split)


def _rules(draw: random.Random, subject: str, category: str, *, always_subject: bool) -> list[_Rule]:
    left = list(_ATTRIBUTES)
    draw.shuffle(left)
    rules: list[_Rule] = []
    while len(left) > 2 and len(rules) < 5:
        about = subject if always_subject else draw.choice([category, subject])
        count = draw.randint(2, 3)
        chosen, left = left[:count], left[count:]
        rules.append(_Rule(about, category, chosen[:-1], draw.choice(["and", "or"]), chosen[-1]))
    return rules


def _test(draw: random.Random, rules: Sequence[_Rule]) -> tuple[list[str], list[str], list[str]]:
    """Two attributes, as they are and as synonyms, and what follows; rarely nothing does."""
    while True:
        general = draw.sample(list(_ATTRIBUTES), 2)
        specific = [draw.choice(_ATTRIBUTES[each]) for each in general]
        follows = [rule.then for rule in rules if rule.then not in general and rule.applies(general)]
        if follows or not draw.random() > 0.1:
            return general, specific, follows


def _synthetic_reasoning_natural_spec(difficulty: str) -> RunSpec:
    return RunSpec(
        name=f"synthetic_reasoning_natural:difficulty={difficulty}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "synthetic_reasoning_natural_scenario.SRNScenario",
            args={"difficulty": difficulty},
        ),
        adapter_spec=asking.generation(
            instructions="Please solve the following problem.",
            input_noun="Rules",
            newline_after_input_noun=True,
            max_train_instances=3,
            max_tokens=20,
        ),
        metric_specs=asking.basic("f1_set_match", "iou_set_match", "exact_set_match") + asking.harms(),
        groups=("synthetic_reasoning", "synthetic_reasoning_natural"),
    )


# --- numbers ----------------------------------------------------------------------------------------------


def load_numeracy(_: DataFolder, *, relation: str = "linear", num_instances: int = 100) -> list[Instance]:
    """Continue a table of x and y where y = a x + b ("linear") or y = a x^2 + b x + c ("parabola")."""
    if relation not in ("linear", "parabola"):
        raise unknown_name("relation of numeracy", relation, ("linear", "parabola"))
    draw = random.Random(_SEED)
    instances = []
    for index in range(20 + int(num_instances)):
        a, b, c = draw.randint(1, 5), draw.randint(-5, 5), draw.randint(-5, 5)

        def value(x: int, a: int = a, b: int = b, c: int = c) -> int:
            return a * x + b if relation == "linear" else a * x * x + b * x + c

        points = draw.sample(range(-10, 11), 5)
        shown = "; ".join(f"{x}, {value(x)}" for x in points[:-1])
        answer = str(value(points[-1]))
        text = f"{shown}; {points[-1]},"
        split = TRAIN if index < 20 else TEST
        instances.append(Instance(input=text, references=(correct(answer),), split=split))
    return instances


_NUMERACY = "capstan.evaluation.scenarios.generators.NumeracyScenario"


def _numeracy_spec(relation: str = "linear") -> RunSpec:
    return RunSpec(
        name=f"numeracy:relation={relation}",
        scenario_spec=ScenarioSpec(class_name=_NUMERACY, args={"relation": relation}),
        adapter_spec=asking.generation(
            instructions="Find the missing number.", output_noun="Answer", max_tokens=10
        ),
        metric_specs=asking.basic("exact_match", "quasi_exact_match", "absolute_value_difference"),
        groups=("numeracy",),
    )


SCENARIOS = (
    Scenario(
        name="synthetic_reasoning",
        folder="synthetic_reasoning",
        class_name=_HELM + "synthetic_reasoning_scenario.SyntheticReasoningScenario",
        description="Patterns of symbols (Wu et al. 2021)",
        load=load_synthetic_reasoning,
        run_spec=_synthetic_reasoning_spec,
        main_metric="quasi_exact_match",
    ),
    Scenario(
        name="synthetic_reasoning_natural",
        folder="synthetic_reasoning_natural",
        class_name=_HELM + "synthetic_reasoning_natural_scenario.SRNScenario",
        description="What follows from rules in plain words",
        load=load_synthetic_reasoning_natural,
        run_spec=_synthetic_reasoning_natural_spec,
        main_metric="f1_set_match",
    ),
    Scenario(
        name="numeracy",
        folder="numeracy",
        class_name=_NUMERACY,
        description="Continue a table of numbers",
        load=load_numeracy,
        run_spec=_numeracy_spec,
        main_metric="exact_match",
    ),
)
