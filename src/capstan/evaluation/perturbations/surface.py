"""Changes of how a text looks: case, spaces, typing errors, filler words.

Source: HELM, `augmentations/`; NL-Augmenter for typing errors and fillers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from capstan.evaluation.perturbations.perturbation import Perturbation

# Keys beside each key of a QWERTY keyboard.
_NEIGHBOURS = dict(
    pair.split(":")
    for pair in [
        "q:was",
        "w:qesad",
        "e:wsdfr",
        "r:edfgt",
        "t:rfghy",
        "y:tghju",
        "u:yhjki",
        "i:ujklo",
        "o:iklp",
        "p:ol",
        "a:qwsz",
        "s:weadzx",
        "d:erfcxs",
        "f:rtgvcd",
        "g:tyhbvf",
        "h:yujnbg",
        "j:uikmnh",
        "k:iolmj",
        "l:opk",
        "z:asx",
        "x:sdcz",
        "c:dfvx",
        "v:fgbc",
        "b:ghnv",
        "n:hjmb",
        "m:jkn",
    ]
)
# Kovatchev et al. 2021 (opinions, doubts); Laserna et al. 2014 (fillers).
_OPINIONS = [
    "I think",
    "I believe",
    "I mean",
    "I guess",
    "that is",
    "I assume",
    "I feel",
    "In my opinion",
    "I would say",
]
_FILLERS = [
    "maybe",
    "perhaps",
    "probably",
    "possibly",
    "most likely",
    "uhm",
    "umm",
    "ahh",
    "err",
    "actually",
    "obviously",
    "naturally",
    "like",
    "you know",
]


@dataclass(frozen=True, kw_only=True)
class Lowercase(Perturbation):
    """Small letters throughout."""

    name: str = "lowercase"
    is_robustness: bool = True

    def change(self, text: str, rng: Random) -> str:
        """The text in small letters."""
        return text.lower()


@dataclass(frozen=True, kw_only=True)
class Space(Perturbation):
    """Runs of spaces become 1 to `max_spaces` spaces."""

    name: str = "space"
    is_robustness: bool = True
    max_spaces: int

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {"max_spaces": self.max_spaces}

    def change(self, text: str, rng: Random) -> str:
        """The text with other spaces."""
        return re.sub(r" +", lambda _: " " * rng.randint(1, self.max_spaces), text)


@dataclass(frozen=True, kw_only=True)
class ExtraSpace(Perturbation):
    """Each space becomes `num_spaces`."""

    name: str = "extra_space"
    is_robustness: bool = True
    num_spaces: int

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {"num_spaces": self.num_spaces}

    def change(self, text: str, rng: Random) -> str:
        """The text with more spaces."""
        return text.replace(" ", " " * self.num_spaces)


@dataclass(frozen=True, kw_only=True)
class Typos(Perturbation):
    """Letters slip to a neighbouring key with probability `prob`."""

    name: str = "typos"
    is_robustness: bool = True
    prob: float

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {"prob": self.prob}

    def change(self, text: str, rng: Random) -> str:
        """The text with typing errors."""
        return "".join(self._typed(letter, rng) for letter in text)

    def _typed(self, letter: str, rng: Random) -> str:
        small = letter.lower()
        typed = small
        if small in _NEIGHBOURS and rng.random() < self.prob:
            typed = rng.choice(_NEIGHBOURS[small])
        return typed if small == letter else typed.upper()


@dataclass(frozen=True, kw_only=True)
class FillerWords(Perturbation):
    """Phrases that mean nothing stand before words, with probability `insert_prob` each.

    `speaker_ph`: opinions ("I think") are among them.
    """

    name: str = "filler_words"
    is_robustness: bool = True
    insert_prob: float = 0.333
    max_num_insert: int | None = None
    speaker_ph: bool = True

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {"insert_prob": self.insert_prob}

    def change(self, text: str, rng: Random) -> str:
        """The text with fillers."""
        words: list[str] = []
        fillers = [*(_OPINIONS if self.speaker_ph else ()), *_FILLERS]
        count = 0
        for word in text.split(" "):
            may = self.max_num_insert is None or count < self.max_num_insert
            if may and rng.random() <= self.insert_prob:
                words.append(rng.choice(fillers))
                count += 1
            words.append(word)
        return " ".join(words)
