"""Other dialects, genders and names: changes that should not change an answer.

Source: HELM, `augmentations/dialect_perturbation.py`, `gender_perturbation.py`. A word is only changed
where a character stands on both of its sides, and that character is then used up: a text's first and last
word and the second of two neighbours stay, as in HELM.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from capstan.errors import unknown_name
from capstan.evaluation.perturbations.perturbation import Perturbation, in_case_of

# A few of the commonest; the full dictionary is read from the data folder.
_SHORT_DIALECT = (
    "the:da with:wit,wif that:dat this:dis them:dem they:dey there:dere these:dese those:dose because:cuz "
    "about:bout going:goin something:sumthin nothing:nuffin your:yo and:an brother:brotha mother:motha "
    "thing:thang just:jus for:fo more:mo before:befo morning:mornin"
)
SHORT_DIALECT: Mapping[str, tuple[str, ...]] = {
    word: tuple(others.split(",")) for word, others in (pair.split(":") for pair in _SHORT_DIALECT.split())
}


@dataclass(frozen=True, kw_only=True)
class Dialect(Perturbation):
    """Words of standard American English become those of African American Vernacular English.

    `mapping` is word to words; HELM's is of VALUE (Ziems et al. 2022, arXiv 2204.03031), which has no licence
    and is therefore read from the data folder. Without it a short list of our own is taken.
    """

    name: str = "dialect"
    is_fairness: bool = True
    changes_references: bool = True
    prob: float = 1.0
    source_class: str = "SAE"
    target_class: str = "AAVE"
    mapping: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: SHORT_DIALECT, hash=False, repr=False
    )

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {"prob": self.prob, "source_class": self.source_class, "target_class": self.target_class}

    def change(self, text: str, rng: Random) -> str:
        """The text in the other dialect."""
        pattern = rf"[^\w-]({'|'.join(map(re.escape, self.mapping))})[^\w-]"

        def changed(found: re.Match[str]) -> str:
            whole, word = found.group(0), found.group(1)
            if rng.uniform(0, 1) >= self.prob:
                return whole
            return whole.replace(word, in_case_of(word, rng.choice(self.mapping[word.lower()])))

        return re.sub(pattern, changed, text, flags=re.IGNORECASE)


# neutral, female, male; Garg et al. 2018, Bolukbasi et al. 2016, and HELM's additions.
_TERMS = (
    "child daughter son, children daughters sons, parent mother father, parents mothers fathers, "
    "kiddo girl boy, "
    "kiddos girls boys, person woman man, people women men, sibling sister brother, siblings sisters "
    "brothers, "
    "nibling niece nephew, niblings nieces nephews, monarch queen king, monarchs queens kings, "
    "server waitress waiter, servers waitresses waiters, parent mom dad, parents moms dads, "
    "stepchild stepdaughter stepson, stepchildren stepdaughters stepsons, stepparent stepmother stepfather, "
    "stepparents stepmothers stepfathers, stepparent stepmom stepdad, stepparents stepmoms stepdads, "
    "grandchild granddaughter grandson, grandchildren granddaughters grandsons, "
    "grandparent grandmother grandfather, grandparents grandmothers grandfather, "
    "grandparent grandma granddad, grandparents grandmas granddads, human female male, humans females males"
)
# Lauscher et al. 2022. "him" becomes "her", also where a man would say "she": one pair each, as in HELM.
_PRONOUNS = "they she he, them her him, their her his, theirs hers his, themselves herself himself"
_GENDERS = ("neutral", "female", "male")
_MAPPINGS = {
    mode: [tuple(row.split()) for row in text.split(", ")]
    for mode, text in {"terms": _TERMS, "pronouns": _PRONOUNS}.items()
}


@dataclass(frozen=True, kw_only=True)
class Gender(Perturbation):
    """Words of one gender become those of another; `mode` is "terms" or "pronouns"."""

    name: str = "gender"
    is_fairness: bool = True
    changes_references: bool = True
    mode: str = "pronouns"
    prob: float = 1.0
    source_class: str = "male"
    target_class: str = "female"
    bidirectional: bool = False

    def __post_init__(self) -> None:
        if self.mode not in _MAPPINGS:
            raise unknown_name("mode of the gender perturbation", self.mode, _MAPPINGS)
        for gender in (self.source_class, self.target_class):
            if gender not in _GENDERS:
                raise unknown_name("gender", gender, _GENDERS)

    @property
    def parameters(self) -> Mapping[str, Any]:
        names = ("mode", "prob", "source_class", "target_class", "bidirectional")
        return {name: getattr(self, name) for name in names}

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        source, target = _GENDERS.index(self.source_class), _GENDERS.index(self.target_class)
        pairs = [(row[source], row[target]) for row in _MAPPINGS[self.mode]]
        return pairs + [(other, one) for one, other in pairs] if self.bidirectional else pairs

    def change(self, text: str, rng: Random) -> str:
        """The text with words of the other gender, one pair of words after another."""
        for word, other in self._pairs:
            text = self._replaced(text, word, other, rng)
        return text

    def _replaced(self, text: str, word: str, other: str, rng: Random) -> str:
        def changed(found: re.Match[str]) -> str:
            whole, written = found.group(0), found.group(1)
            if rng.uniform(0, 1) >= self.prob:
                return whole
            return whole.replace(written, in_case_of(written, other))

        return re.sub(rf"[^\w]({word})[^\w]", changed, text, flags=re.IGNORECASE)
