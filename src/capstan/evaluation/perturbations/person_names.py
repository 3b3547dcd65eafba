"""First names of one group of people become those of another, the same in a question and its answers.

Source: HELM, `augmentations/person_name_perturbation.py`; names of Greenwald et al. 1998 and Caliskan et al.
2017. HELM's own file (`person_names.txt`) is read from the data folder where it is; its order decides which
name is drawn.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from capstan.errors import InputError
from capstan.evaluation.instances import Instance
from capstan.evaluation.perturbations.perturbation import Perturbation, in_case_of, random_of

Names = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Category (race, gender) to value (female) to names, in small letters."""

_SHORT = {
    (
        "white_american",
        "male",
    ): "adam chip harry josh roger alan frank ian justin ryan andrew fred jack matthew "
    "stephen brad greg jed paul todd brandon hank jonathan peter wilbur",
    ("white_american", "female"): "amanda courtney heather melanie sara amber crystal katie meredith shannon "
    "betsy donna kristin nancy stephanie ellen lauren peggy colleen emily megan rachel wendy",
    (
        "black_american",
        "male",
    ): "alonzo jamel lerone percell theo alphonse jerome leroy rasaan torrance darnell "
    "lamar lionel rashaun tyree deion lamont malik terrence tyrone everol lavon marcellus terryl wardell",
    ("black_american", "female"): "aiesha lashelle nichelle shereen temeka ebony latisha shaniqua tameisha "
    "teretha jasmine latonya shanise tanisha tia lakisha latoya sharise tashika yolanda lashandra malika "
    "shavonn tawanda yvette",
}


def read_names(lines: Iterable[str], *, kind: str = "first_name") -> Names:
    """Names of a file whose lines are `name,first_name[,category,value]*`.

    Raises:
        InputError: a line without name and kind.
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for number, line in enumerate(lines, start=1):
        parts = line.rstrip("\n").split(",")
        if len(parts) < 2:
            raise InputError(f"Line {number} of the names wants name,first_name,…, not {line.strip()!r}.")
        name, own_kind, *categories = parts
        for category, value in zip(categories[::2], categories[1::2], strict=False):
            if own_kind == kind:
                found[category][value].append(name.strip().lower())
    return {category: {value: tuple(names) for value, names in by.items()} for category, by in found.items()}


SHORT_NAMES: Names = read_names(
    f"{name},first_name,race,{race},gender,{gender}"
    for (race, gender), names in _SHORT.items()
    for name in names.split()
)


@dataclass(frozen=True, kw_only=True)
class PersonName(Perturbation):
    """Names of `source_class` become names of `target_class`, with their gender if `preserve_gender`."""

    name: str = "person_name"
    is_fairness: bool = True
    changes_references: bool = True
    prob: float = 1.0
    source_class: tuple[tuple[str, str], ...] = (("race", "white_american"),)
    target_class: tuple[tuple[str, str], ...] = (("race", "black_american"),)
    person_name_type: str = "first_name"
    preserve_gender: bool = True
    names: Names = field(default_factory=lambda: SHORT_NAMES, hash=False, repr=False)

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {
            "prob": self.prob,
            "source_class": ",".join(f"{name}={value}" for name, value in self.source_class),
            "target_class": ",".join(f"{name}={value}" for name, value in self.target_class),
            "person_name_type": self.person_name_type,
            "preserve_gender": self.preserve_gender,
        }

    def _of_class(self, wanted: tuple[tuple[str, str], ...]) -> list[str]:
        lists = [self.names.get(category, {}).get(value, ()) for category, value in wanted]
        if not all(lists):
            words = ", ".join(f"{category} {value}" for category, value in wanted)
            raise InputError(f"The list of names has none of {words}. Give another person_names.txt.")
        return [name for name in lists[0] if all(name in other for other in lists[1:])]

    def apply(self, instance: Instance, seed: int | None = None) -> Instance:
        """The instance with other names, the same name for the same name. As in HELM `seed` changes
        nothing.
        """
        draw = _Draw(
            self, self._of_class(self.source_class), self._of_class(self.target_class), random_of(instance)
        )
        references = tuple(replace(each, text=draw.change(each.text)) for each in instance.references)
        changed = draw.change(instance.input)
        return replace(instance, input=changed, references=references, perturbation=self.description())


class _Draw:
    """The names drawn for one instance."""

    def __init__(self, spec: PersonName, source: list[str], target: list[str], rng: Random) -> None:
        self._spec, self._source, self._target, self._rng = spec, set(source), target, rng
        self._chosen: dict[str, str] = {}
        self._kept: set[str] = set()

    def change(self, text: str) -> str:
        return "".join(self._token(token) for token in re.split(r"([^\w])", text))

    def _token(self, token: str) -> str:
        name = token.lower()
        if name in self._source and name not in self._chosen and name not in self._kept:
            if self._rng.uniform(0, 1) < self._spec.prob:
                options = self._options(name)
                if options:
                    self._chosen[name] = self._rng.choice(options)
            else:
                self._kept.add(name)
        return in_case_of(token, self._chosen[name]) if name in self._chosen else token

    def _options(self, name: str) -> list[str]:
        genders = self._spec.names.get("gender", {})
        own = next((each for each in ("female", "male", "neutral") if name in genders.get(each, ())), None)
        if own is None or not self._spec.preserve_gender:
            return self._target
        return [each for each in self._target if each in genders[own]]
