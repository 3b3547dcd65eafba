"""Dyck languages: close the brackets that are open.

Source: Suzgun et al. 2019; HELM, `scenarios/dyck_language_scenario.py`, whose random draws are in its order.
"""

import random
from collections.abc import Sequence

import numpy as np

from capstan.errors import UsageError
from capstan.evaluation.instances import TEST, TRAIN, Instance, correct
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."
_SEED = 42
_BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"), ("<", ">"))


class _Dyck:
    """Draws words of the Dyck language with so many kinds of brackets."""

    def __init__(self, num_pairs: int) -> None:
        self._draw, self._numpy = random.Random(_SEED), np.random.RandomState(_SEED)
        self._opening = [pair[0] for pair in _BRACKETS[:num_pairs]]
        self._closing = [pair[1] for pair in _BRACKETS[:num_pairs]]

    def corpus(
        self, count: int, shortest: int, longest: int, *, without: Sequence[str] = ()
    ) -> list[tuple[str, str]]:
        """Distinct beginnings of words with the brackets that close them."""
        found: dict[str, str] = {}
        while len(found) < count:
            text, answer = self._problem(shortest, longest)
            if text not in found and text not in without:
                found[text] = answer
        return list(found.items())

    def _problem(self, shortest: int, longest: int) -> tuple[str, str]:
        while True:
            word = self._word(0, longest)
            if len(word) >= shortest:
                beginning = self._beginning(word, self._draw.randint(1, 3))
                if beginning:
                    return " ".join(beginning), " ".join(self._closed(beginning))

    def _word(self, depth: int, longest: int = 100) -> list[str]:
        if depth > 100:
            return []
        chance = self._draw.random()
        word: list[str] = []
        if chance < 0.5:
            kind = self._numpy.randint(len(self._opening))
            word = [self._opening[kind], *self._word(depth + 1), self._closing[kind]]
        elif chance < 0.75:
            word = self._word(depth) + self._word(depth)
        return word if len(word) <= longest else []

    def _beginning(self, word: Sequence[str], open_at_end: int) -> Sequence[str]:
        """As much of a word as leaves so many brackets open."""
        depth = 0
        for at in range(len(word) - 1, -1, -1):
            depth += -1 if word[at] in self._opening else 1
            if depth == open_at_end:
                return word[:at]
        return []

    def _closed(self, beginning: Sequence[str]) -> list[str]:
        stack: list[str] = []
        for bracket in beginning:
            if bracket in self._opening:
                stack.append(self._closing[self._opening.index(bracket)])
            else:
                stack.pop()
        return stack[::-1]


def load_dyck_language(_: DataFolder, *, num_parenthesis_pairs: int) -> list[Instance]:
    """Close what is open: 3 short words for training, 500 longer ones."""
    if not 1 <= int(num_parenthesis_pairs) <= 4:
        raise UsageError(f"The Dyck language has 1 to 4 kinds of brackets, not {num_parenthesis_pairs}.")
    dyck = _Dyck(int(num_parenthesis_pairs))
    train = dyck.corpus(3, 4, 50)
    test = dyck.corpus(500, 52, 100, without=[text for text, _ in train])
    return [
        Instance(input=text, references=(correct(" " + answer),), split=split)
        for split, pairs in ((TRAIN, train), (TEST, test))
        for text, answer in pairs
    ]


def _dyck_language_spec(num_parenthesis_pairs: str | int) -> RunSpec:
    count = int(num_parenthesis_pairs)
    return RunSpec(
        name=f"dyck_language_np={count}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "dyck_language_scenario.DyckLanguageScenario",
            args={"num_parenthesis_pairs": count},
        ),
        adapter_spec=asking.completion(
            instructions="Please complete the rest of the following Dyck sequences, making sure that the "
            "parentheses are closed properly.",
            input_prefix="Input: ",
            max_tokens=5,
            max_train_instances=3,
            stop=("\n",),
        ),
        metric_specs=asking.of_generation("exact_match_indicator") + asking.harms(),
        groups=("dyck_language",),
    )


SCENARIOS = (
    Scenario(
        name="dyck_language",
        folder="dyck_language",
        class_name=_HELM + "dyck_language_scenario.DyckLanguageScenario",
        description="Close what is open (Suzgun et al. 2019)",
        load=load_dyck_language,
        run_spec=_dyck_language_spec,
        main_metric="exact_match_indicator",
    ),
)
