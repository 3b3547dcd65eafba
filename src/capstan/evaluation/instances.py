"""What a scenario consists of: instances, their references, and how one was perturbed.

Names are HELM's. An instance is a question; its references are possible answers, some of them correct.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TRAIN, VALID, TEST = "train", "valid", "test"
EVAL_SPLITS = (VALID, TEST)
CORRECT = "correct"

ComputedOn = Literal["original", "perturbed", "worst"]


@dataclass(frozen=True, kw_only=True)
class PerturbationDescription:
    """How an instance was perturbed, and which of the metric families that is for.

    `parameters` are those of the perturbation, by name. `computed_on` belongs to statistics: over the
    instances as they were, as perturbed, or the worse of both.
    """

    name: str
    robustness: bool = False
    fairness: bool = False
    computed_on: ComputedOn = "perturbed"
    seed: int | None = None
    parameters: tuple[tuple[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's files."""
        own = {
            "name": self.name,
            "robustness": self.robustness,
            "fairness": self.fairness,
            "computed_on": self.computed_on,
        }
        return own | ({"seed": self.seed} if self.seed is not None else {}) | dict(self.parameters)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A possible answer. Tags: `correct`; in ranking also `relevance=3` and `rank=12`.

    `test_cases` belong to code: what a program is checked with.
    """

    text: str
    tags: tuple[str, ...] = ()
    test_cases: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def is_correct(self) -> bool:
        """Whether it is tagged as a right answer."""
        return CORRECT in self.tags

    def tag_value(self, name: str) -> int | None:
        """The number in a tag such as `rank=12`, if there is one."""
        found = [tag.split("=", 1)[1] for tag in self.tags if tag.startswith(f"{name}=")]
        return int(found[0]) if found else None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's files."""
        own: dict[str, Any] = {"output": {"text": self.text}, "tags": list(self.tags)}
        return own | ({"test_cases": dict(self.test_cases)} if self.test_cases is not None else {})


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One question: its text, possible answers, and which part of the data it belongs to.

    `is_composed`: of a passage and a question. HELM keeps such an instance's perturbed copies also where
    nothing changed, for it compares two kinds of inputs. `contrasts` are an author's own variants of it,
    each an input with its references (contrast sets). `extra` is what a metric of this scenario needs
    beside; it is not part of the identity.
    """

    input: str
    references: tuple[Reference, ...] = ()
    split: str | None = None
    sub_split: str | None = None
    id: str | None = None
    perturbation: PerturbationDescription | None = None
    is_composed: bool = False
    contrasts: tuple[tuple[str, tuple[Reference, ...]], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def first_correct(self) -> Reference | None:
        """The first right answer, if there is any."""
        return next((reference for reference in self.references if reference.is_correct), None)

    @property
    def all_correct(self) -> tuple[Reference, ...]:
        """Every right answer."""
        return tuple(reference for reference in self.references if reference.is_correct)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's files; what is None is left out."""
        own: dict[str, Any] = {
            "input": {"text": self.input},
            "references": [reference.to_dict() for reference in self.references],
        }
        for name in ("split", "sub_split", "id"):
            if getattr(self, name) is not None:
                own[name] = getattr(self, name)
        if self.perturbation is not None:
            own["perturbation"] = self.perturbation.to_dict()
        if self.extra:
            own["extra_data"] = dict(self.extra)
        return own


def correct(text: str) -> Reference:
    """A reference that is right."""
    return Reference(text=text, tags=(CORRECT,))


def choices(texts: list[str] | tuple[str, ...], right: int | set[int]) -> tuple[Reference, ...]:
    """References of a multiple-choice question; `right` says which are correct, by index."""
    among = {right} if isinstance(right, int) else right
    return tuple(
        Reference(text=text, tags=(CORRECT,) if index in among else ()) for index, text in enumerate(texts)
    )
