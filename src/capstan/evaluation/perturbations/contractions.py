"""Contractions and what they stand for: "it's" and "it is".

Source: the list of contractions that NL-Augmenter and HELM share, in their order: of several contractions of
the same words the last is taken.
"""

import re
from dataclasses import dataclass
from random import Random

from capstan.evaluation.perturbations.perturbation import Perturbation, in_case_of

_LIST = (
    "ain't=is not; aren't=are not; can't=cannot; can't've=cannot have; could've=could have; "
    "couldn't=could not; didn't=did not; doesn't=does not; don't=do not; hadn't=had not; "
    "hasn't=has not; haven't=have not; he'd=he would; he'd've=he would have; he'll=he will; "
    "he's=he is; how'd=how did; how'd'y=how do you; how'll=how will; how's=how is; I'd=I would; "
    "I'll=I will; I'm=I am; I've=I have; i'd=i would; i'll=i will; i'm=i am; i've=i have; "
    "isn't=is not; it'd=it would; it'll=it will; it's=it is; ma'am=madam; might've=might have; "
    "mightn't=might not; must've=must have; mustn't=must not; needn't=need not; oughtn't=ought not; "
    "shan't=shall not; she'd=she would; she'll=she will; she's=she is; should've=should have; "
    "shouldn't=should not; that'd=that would; that's=that is; there'd=there would; there's=there is; "
    "they'd=they would; they'll=they will; they're=they are; they've=they have; wasn't=was not; "
    "we'd=we would; we'll=we will; we're=we are; we've=we have; weren't=were not; what're=what are; "
    "what's=what is; when's=when is; where'd=where did; where's=where is; where've=where have; "
    "who'll=who will; who's=who is; who've=who have; why's=why is; won't=will not; "
    "would've=would have; wouldn't=would not; you'd=you would; you'd've=you would have; "
    "you'll=you will; you're=you are; you've=you have"
)
EXPANSIONS = dict(pair.split("=") for pair in _LIST.split("; "))
CONTRACTIONS = {long: short for short, long in EXPANSIONS.items()}
_FLAGS = re.IGNORECASE | re.DOTALL
_SHORT = re.compile(rf"\b({'|'.join(EXPANSIONS)})\b", _FLAGS)
# Only before a space: at a sentence's end nobody writes "yes, it's".
_LONG = re.compile(rf"\b({'|'.join(CONTRACTIONS)})\b ", _FLAGS)


@dataclass(frozen=True, kw_only=True)
class Contraction(Perturbation):
    """Contracts what can be contracted."""

    name: str = "contraction"
    is_robustness: bool = True

    def change(self, text: str, rng: Random) -> str:
        """Every expansion that a space follows becomes its contraction."""

        def contracted(found: re.Match[str]) -> str:
            words = found.group(1)
            return in_case_of(words, CONTRACTIONS.get(words) or CONTRACTIONS[words.lower()]) + " "

        return _LONG.sub(contracted, text)


@dataclass(frozen=True, kw_only=True)
class Expansion(Perturbation):
    """Writes contractions out."""

    name: str = "expansion"
    is_robustness: bool = True

    def change(self, text: str, rng: Random) -> str:
        """Every contraction becomes what it stands for."""

        def expanded(found: re.Match[str]) -> str:
            words = found.group(0)
            return in_case_of(words, EXPANSIONS.get(words) or EXPANSIONS[words.lower()])

        return _SHORT.sub(expanded, text)
