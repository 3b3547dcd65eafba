"""Words become synonyms with probability `prob`.

Source: HELM, `augmentations/synonym_perturbation.py`. Differs: HELM asks spaCy for a word's kind and WordNet
for its base; here the data folder's `synonyms.json` lists words as they are written, so copies are not equal
to HELM's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from capstan.evaluation.perturbations.perturbation import Perturbation, in_case_of


@dataclass(frozen=True, kw_only=True)
class Synonym(Perturbation):
    """`synonyms` is word to words."""

    name: str = "synonym"
    is_robustness: bool = True
    prob: float
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False, repr=False)

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {"prob": self.prob}

    def change(self, text: str, rng: Random) -> str:
        """The text with synonyms."""

        def changed(found: re.Match[str]) -> str:
            word = found.group(0)
            others = [each for each in self.synonyms.get(word.lower(), ()) if each != word.lower()]
            if not others or rng.uniform(0, 1) >= self.prob:
                return word
            return in_case_of(word, rng.choice(others))

        return re.sub(r"\w+", changed, text)
