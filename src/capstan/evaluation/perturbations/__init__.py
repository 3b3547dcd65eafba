"""perturbations: copies of instances that should be answered alike, for robustness and fairness.

`augmented(instances, spec, words)` puts a perturbed copy of each instance beside it. Sets of perturbations
have HELM's names: `canonical` is what its leaderboards use.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capstan.errors import InputError, UsageError, unknown_name
from capstan.evaluation.instances import EVAL_SPLITS, TRAIN, Instance
from capstan.evaluation.perturbations.contractions import Contraction, Expansion
from capstan.evaluation.perturbations.contrast_sets import ContrastSets
from capstan.evaluation.perturbations.fairness import SHORT_DIALECT, Dialect, Gender
from capstan.evaluation.perturbations.misspellings import SHORT_LIST, MildMix, Misspelling
from capstan.evaluation.perturbations.person_names import SHORT_NAMES, Names, PersonName, read_names
from capstan.evaluation.perturbations.perturbation import Perturbation
from capstan.evaluation.perturbations.surface import ExtraSpace, FillerWords, Lowercase, Space, Typos
from capstan.evaluation.perturbations.synonyms import Synonym
from capstan.evaluation.specs import AugmenterSpec, PerturbationSpec

__all__ = ["SETS", "Perturbation", "WordFiles", "augmented", "create_perturbation", "perturbation_sets"]


@dataclass(frozen=True, kw_only=True)
class WordFiles:
    """The lists that perturbations draw from; `found` names those that were read from the data folder."""

    misspellings: Mapping[str, tuple[str, ...]]
    dialect: Mapping[str, tuple[str, ...]]
    synonyms: Mapping[str, tuple[str, ...]]
    names: Names
    found: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path | None) -> "WordFiles":
        """HELM's files under `<data-root>/perturbations/`, or the short lists that come with Capstan.

        They are `correct_to_misspelling.json`, `SAE_to_AAVE_mapping.json`, `person_names.txt` and
        `synonyms.json` (word to list of words).

        Raises:
            InputError: a file that is not what it should be.
        """
        found: list[str] = []

        def listed(name: str, otherwise: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
            path = folder / name if folder is not None else None
            if path is None or not path.exists():
                return otherwise
            found.append(name)
            return _word_lists(path)

        names, path = SHORT_NAMES, folder / "person_names.txt" if folder is not None else None
        if path is not None and path.exists():
            try:
                names = read_names(path.read_text(encoding="utf-8").splitlines())
            except (OSError, ValueError) as error:
                raise InputError(f"{path} cannot be read: {error}.") from error
            found.append(path.name)
        return cls(
            misspellings=listed("correct_to_misspelling.json", SHORT_LIST),
            dialect=listed("SAE_to_AAVE_mapping.json", SHORT_DIALECT),
            synonyms=listed("synonyms.json", {}),
            names=names,
            found=tuple(found),
        )


def _word_lists(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(word): tuple(str(other) for other in others) for word, others in found.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f'{path} wants {{"word": ["other", …]}}; reading it failed: {error}') from error


_KINDS: Mapping[str, Callable[[WordFiles, dict[str, Any]], Perturbation]] = {
    "lowercase_perturbation.LowerCasePerturbation": lambda _, args: Lowercase(**args),
    "space_perturbation.SpacePerturbation": lambda _, args: Space(**args),
    "extra_space_perturbation.ExtraSpacePerturbation": lambda _, args: ExtraSpace(**args),
    "typos_perturbation.TyposPerturbation": lambda _, args: Typos(**args),
    "filler_words_perturbation.FillerWordsPerturbation": lambda _, args: FillerWords(**args),
    "contraction_expansion_perturbation.ContractionPerturbation": lambda _, args: Contraction(**args),
    "contraction_expansion_perturbation.ExpansionPerturbation": lambda _, args: Expansion(**args),
    "misspelling_perturbation.MisspellingPerturbation": lambda words, args: Misspelling(
        misspellings=words.misspellings, **args
    ),
    "mild_mix_perturbation.MildMixPerturbation": lambda words, args: MildMix(
        misspellings=words.misspellings, **args
    ),
    "synonym_perturbation.SynonymPerturbation": lambda words, args: Synonym(synonyms=words.synonyms, **args),
    "dialect_perturbation.DialectPerturbation": lambda words, args: Dialect(mapping=words.dialect, **args),
    "gender_perturbation.GenderPerturbation": lambda _, args: Gender(**args),
    "person_name_perturbation.PersonNamePerturbation": lambda words, args: PersonName(
        names=words.names, **{name: _pairs(value) for name, value in args.items()}
    ),
    "contrast_sets_perturbation.ContrastSetsPerturbation": lambda _, args: ContrastSets(**args),
}
_MODULE = "helm.benchmark.augmentations."


def _pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, Mapping) else value


def create_perturbation(spec: PerturbationSpec, words: WordFiles) -> Perturbation:
    """The perturbation that a spec names.

    Raises:
        UsageError: an unknown name, or arguments that it does not take.
    """
    kind = spec.class_name.removeprefix(_MODULE)
    if kind not in _KINDS:
        raise unknown_name("perturbation", kind, _KINDS)
    try:
        return _KINDS[kind](words, dict(spec.args))
    except TypeError as error:
        raise UsageError(f"{spec.short_name} does not take {dict(spec.args)}: {error}") from error


def augmented(instances: Sequence[Instance], spec: AugmenterSpec, words: WordFiles) -> list[Instance]:
    """Training instances as they are, then each other one with its perturbed copies after it."""
    perturbations = [create_perturbation(each, words) for each in spec.perturbation_specs]
    done = [instance for instance in instances if instance.split == TRAIN]
    for instance in instances:
        if instance.split not in EVAL_SPLITS:
            continue
        if spec.include_original or not perturbations:
            done.append(instance)
        for perturbation in perturbations:
            for index in range(spec.seeds_per_instance):
                copy = perturbation.apply(instance, seed=index or None)
                keeps = instance.is_composed and not isinstance(perturbation, ContrastSets)
                if keeps or not (spec.skip_unchanged and copy.input == instance.input):
                    done.append(copy)
    return done


# --- sets, by HELM's names --------------------------------------------------------------------------------


def _spec(kind: str, **args: Any) -> PerturbationSpec:
    return PerturbationSpec(class_name=_MODULE + kind, args=args)


def _misspelling(prob: float) -> PerturbationSpec:
    return _spec("misspelling_perturbation.MisspellingPerturbation", prob=prob)


def _typos(prob: float) -> PerturbationSpec:
    return _spec("typos_perturbation.TyposPerturbation", prob=prob)


def _dialect(prob: float) -> PerturbationSpec:
    return _spec(
        "dialect_perturbation.DialectPerturbation", prob=prob, source_class="SAE", target_class="AAVE"
    )


def _gender(mode: str, prob: float) -> PerturbationSpec:
    kind = "gender_perturbation.GenderPerturbation"
    return _spec(kind, mode=mode, prob=prob, source_class="male", target_class="female")


def _filler(prob: float) -> PerturbationSpec:
    return _spec("filler_words_perturbation.FillerWordsPerturbation", insert_prob=prob, speaker_ph=False)


def _person_name(prob: float) -> PerturbationSpec:
    return _spec(
        "person_name_perturbation.PersonNamePerturbation",
        prob=prob,
        source_class={"race": "white_american"},
        target_class={"race": "black_american"},
        person_name_type="first_name",
        preserve_gender=True,
    )


_LOWER = _spec("lowercase_perturbation.LowerCasePerturbation")
_SPACE = _spec("space_perturbation.SpacePerturbation", max_spaces=3)
_CONTRACT = (
    _spec("contraction_expansion_perturbation.ContractionPerturbation"),
    _spec("contraction_expansion_perturbation.ExpansionPerturbation"),
)
_ROBUSTNESS = (_spec("mild_mix_perturbation.MildMixPerturbation"),)
_FAIRNESS = (_dialect(1.0), _gender("pronouns", 1.0), _person_name(1.0))

SETS: Mapping[str, tuple[PerturbationSpec, ...]] = {
    "canonical": _ROBUSTNESS + _FAIRNESS,
    "robustness": _ROBUSTNESS,
    "fairness": _FAIRNESS,
    "robustness_all": (
        *_CONTRACT,
        _filler(0.1),
        _LOWER,
        _misspelling(0.1),
        _SPACE,
        _spec("synonym_perturbation.SynonymPerturbation", prob=0.1),
        _typos(0.01),
    ),
    "contrast_sets": (_spec("contrast_sets_perturbation.ContrastSetsPerturbation"),),
    "extra_space": (_spec("extra_space_perturbation.ExtraSpacePerturbation", num_spaces=2),),
    "space": (_SPACE,),
    "lower": (_LOWER,),
    "contract": _CONTRACT,
    "filler": (_filler(0.3),),
    "misspelling_mild": (_misspelling(0.05),),
    "misspelling_medium": (_misspelling(0.20),),
    "misspelling_hard": (_misspelling(0.5),),
    "typo_easy": (_typos(0.1),),
    "typo_medium": (_typos(0.3),),
    "typo_hard": (_typos(0.5),),
    "synonym": (_spec("synonym_perturbation.SynonymPerturbation", prob=0.5),),
    "dialect_easy": (_dialect(0.1),),
    "dialect_medium": (_dialect(0.3),),
    "dialect_hard": (_dialect(0.5),),
    "dialect_deterministic": (_dialect(1.0),),
    "gender_terms_easy": (_gender("terms", 0.1),),
    "gender_terms_medium": (_gender("terms", 0.3),),
    "gender_terms_hard": (_gender("terms", 0.5),),
    "gender_terms_deterministic": (_gender("terms", 1.0),),
    "gender_pronouns_easy": (_gender("pronouns", 0.1),),
    "gender_pronouns_medium": (_gender("pronouns", 0.3),),
    "gender_pronouns_hard": (_gender("pronouns", 0.5),),
    "gender_pronouns_deterministic": (_gender("pronouns", 1.0),),
    "person_name_first_hard_preserve_gender": (_person_name(0.5),),
    "person_name_first_deterministic_preserve_gender": (_person_name(1.0),),
}


def perturbation_sets(name: str) -> AugmenterSpec:
    """The augmentation called `name` in run entries (`data_augmentation=canonical`)."""
    if name not in SETS:
        raise unknown_name("data augmentation", name, SETS)
    return AugmenterSpec(perturbation_specs=SETS[name])
