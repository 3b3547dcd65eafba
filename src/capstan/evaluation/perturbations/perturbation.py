"""What a perturbation is: a change of an instance's text whose randomness comes from the instance's id.

References are changed before the input and with the same random numbers, as in HELM, so copies are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from capstan.evaluation.instances import Instance, PerturbationDescription


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """A change of text. Kinds override `change`, or `apply` where words must agree over input and references.

    `parameters` tell two perturbations of one kind apart in statistics.
    """

    name: str
    is_robustness: bool = False
    is_fairness: bool = False
    changes_references: bool = False

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What it was made with, by HELM's names."""
        return {}

    def description(self, seed: int | None = None) -> PerturbationDescription:
        """How it is named in statistics."""
        return PerturbationDescription(
            name=self.name,
            robustness=self.is_robustness,
            fairness=self.is_fairness,
            seed=seed,
            parameters=tuple(self.parameters.items()),
        )

    def change(self, text: str, rng: Random) -> str:
        """The changed text."""
        raise NotImplementedError

    def apply(self, instance: Instance, seed: int | None = None) -> Instance:
        """The changed instance, under the same id."""
        rng = random_of(instance, seed)
        references = instance.references
        if self.changes_references:
            references = tuple(replace(each, text=self.change(each.text, rng)) for each in references)
        changed = self.change(instance.input, rng)
        return replace(instance, input=changed, references=references, perturbation=self.description(seed))


def random_of(instance: Instance, seed: int | None = None) -> Random:
    """Random numbers that belong to an instance."""
    assert instance.id is not None, "instances get their ids before they are perturbed"
    return Random(instance.id if seed is None else f"{seed}{instance.id}")


def in_case_of(source: str, target: str) -> str:
    """`target` written as `source` is: all small, all capitals, or with a capital in front."""
    if all(letter.islower() for letter in source):
        return target.lower()
    if all(letter.isupper() for letter in source):
        return target.upper()
    return target.capitalize() if source and source[0].isupper() else target
