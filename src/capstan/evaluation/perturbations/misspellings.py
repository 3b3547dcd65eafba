"""Common misspellings, alone and in the mild mix of perturbations that HELM calls canonical.

Source: HELM, `augmentations/misspelling_perturbation.py`, `mild_mix_perturbation.py`; Wikipedia's list of
common misspellings (CC BY-SA), which is read from the data folder. Without the file a short list of our own
is taken, and the plan says so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Any

from capstan.evaluation.perturbations.contractions import Contraction
from capstan.evaluation.perturbations.perturbation import Perturbation, in_case_of
from capstan.evaluation.perturbations.surface import Lowercase, Space

_SHORT_LIST = (
    "accommodate:accomodate,acommodate achieve:acheive across:accross address:adress already:allready,aready "
    "always:allways apparent:apparant argument:arguement available:availible,availabe beautiful:beatiful "
    "because:becuase,becasue before:befor,befoer beginning:begining believe:beleive business:buisness "
    "calendar:calender character:charachter children:childen could:coudl country:contry course:coarse "
    "definitely:definately different:diferent,diffrent disappear:dissapear environment:enviroment "
    "example:exampel,exmaple except:exept experience:experiance family:familly february:febuary first:frist "
    "foreign:foriegn friend:freind from:form,fron government:goverment group:gruop have:ahve,hvae "
    "height:heigth immediately:immediatly important:importent independent:independant interest:intrest "
    "knowledge:knowlege library:libary million:milion necessary:neccessary,necesary number:nubmer "
    "occasion:ocassion occurred:occured official:offical other:ohter particular:perticular "
    "people:poeple,peopel "
    "piece:peice position:posistion possible:posible president:presidant problem:probelm public:publick "
    "question:quesiton,qestion receive:recieve recommend:reccomend remember:rember really:realy right:rigth "
    "school:shcool science:sience second:secound separate:seperate several:severel should:shoudl "
    "similar:similiar something:somthing,somehting state:staet successful:succesful such:suhc the:teh "
    "their:thier,there there:thier these:theese they:tehy thing:thign this:htis,tihs through:throught,thru "
    "tomorrow:tommorow truly:truely under:udner until:untill usually:usualy very:vrey weather:wether "
    "weird:wierd were:wre what:waht when:wehn where:whre which:whcih,wich while:whlie with:wiht would:woudl "
    "writing:writting year:yaer your:yoru"
)
SHORT_LIST: Mapping[str, tuple[str, ...]] = {
    right: tuple(wrong.split(",")) for right, wrong in (pair.split(":") for pair in _SHORT_LIST.split())
}


@dataclass(frozen=True, kw_only=True)
class Misspelling(Perturbation):
    """Words that have a common misspelling are misspelt with probability `prob`."""

    name: str = "misspellings"
    is_robustness: bool = True
    prob: float
    misspellings: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: SHORT_LIST, hash=False, repr=False
    )

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {"prob": self.prob}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"\b({'|'.join(self.misspellings)})\b")

    def change(self, text: str, rng: Random) -> str:
        """The text with misspellings."""

        def misspelt(found: re.Match[str]) -> str:
            word = found.group(1)
            if rng.random() >= self.prob:
                return word
            return in_case_of(word, rng.choice(self.misspellings[word]))

        return self._pattern.sub(misspelt, text)


@dataclass(frozen=True, kw_only=True)
class MildMix(Perturbation):
    """Small letters, contractions, a tenth of the words that can be misspelt, one to three spaces.

    References stay as they are: it would be unfair to ask for broken text.
    """

    name: str = "mild_mix"
    is_robustness: bool = True
    misspellings: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: SHORT_LIST, hash=False, repr=False
    )

    @cached_property
    def _steps(self) -> tuple[Perturbation, ...]:
        wrong = Misspelling(prob=0.1, misspellings=self.misspellings)
        return Lowercase(), Contraction(), wrong, Space(max_spaces=3)

    def change(self, text: str, rng: Random) -> str:
        """All four, one after another."""
        for step in self._steps:
            text = step.change(text, rng)
        return text
