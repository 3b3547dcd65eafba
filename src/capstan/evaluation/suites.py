"""Suites: lists of run entries under a name.

`core` and `targeted` are the paper's 16 and 26 scenarios, `flexgen7` the seven of FlexGen's 21-hour run,
`smoke` what needs no data and some seconds. `size` caps the instances of each scenario, divided over its
runs, as HELM's presets of 10, 20, 50, 100 and 1000 do.
"""

from capstan.errors import unknown_name

_MMLU = ("abstract_algebra", "college_chemistry", "computer_security", "econometrics", "us_foreign_policy")
_RAFT = (
    "ade_corpus_v2,banking_77,neurips_impact_statement_risks,one_stop_english,overruling,semiconductor_org_types,"
    "systematic_review_inclusion,tai_safety_research,terms_of_service,tweet_eval_hate,twitter_complaints"
).split(",")
_CIVIL = ("all", "male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
_ORIGINAL, _CALIBRATED = "multiple_choice_separate_original", "multiple_choice_separate_calibrated"
_BLIMP = (
    "island_effects,anaphor_agreement,argument_structure,determiner_noun_agreement,subject_verb_agreement,ellipsis,"
    "control_raising,quantifiers,irregular_forms,npi_licensing,binding,filler_gap_dependency"
).split(",")
_WIKIFACT = ("plaintiff", "instance_of", "capital", "place_of_birth", "author", "currency")
_MATH = (
    "number_theory,intermediate_algebra,algebra,prealgebra,geometry,counting_and_probability,precalculus"
).split(",")

_CORE: tuple[tuple[str, ...], ...] = (
    tuple(f"mmlu:subject={each}" for each in _MMLU),
    ("boolq",),
    ("narrative_qa",),
    ("natural_qa:mode=closedbook",),
    ("natural_qa:mode=openbook_longans",),
    ("quac",),
    (f"commonsense:dataset=hellaswag,method={_ORIGINAL}",),
    (f"commonsense:dataset=openbookqa,method={_CALIBRATED}",),
    ("truthful_qa:task=mc_single",),
    ("msmarco:track=regular,valid_topk=30",),
    ("msmarco:track=trec,valid_topk=30",),
    ("summarization_cnndm:temperature=0.3",),
    ("summarization_xsum_sampled:temperature=0.3",),
    ("imdb",),
    tuple(f"civil_comments:demographic={each}" for each in _CIVIL),
    tuple(f"raft:subset={each}" for each in _RAFT),
)
_TARGETED: tuple[tuple[str, ...], ...] = (
    ("the_pile:subset=ArXiv", "the_pile:subset=Github", "the_pile:subset=PubMed Central"),
    ("twitter_aae:demographic=aa", "twitter_aae:demographic=white"),
    ("ice:subset=can", "ice:subset=hk", "ice:subset=ind"),
    tuple(f"blimp:phenomenon={each}" for each in _BLIMP),
    tuple(f"wikifact:k=5,subject={each}" for each in _WIKIFACT),
    tuple(
        f"synthetic_reasoning:mode={each}" for each in ("pattern_match", "variable_substitution", "induction")
    ),
    tuple(f"synthetic_reasoning_natural:difficulty={each}" for each in ("easy", "hard")),
    ("babi_qa:task=all", "babi_qa:task=3", "babi_qa:task=15", "babi_qa:task=19"),
    ("dyck_language:num_parenthesis_pairs=3",),
    ("gsm",),
    tuple(f"math:subject={each},level=1,use_official_examples=True" for each in _MATH),
    tuple(f"math:subject={each},level=1,use_chain_of_thought=True" for each in _MATH),
    ("code:dataset=apps",),
    ("code:dataset=humaneval",),
    ("lsat_qa:task=all",),
    ("legal_support",),
    ("entity_data_imputation:dataset=Buy", "entity_data_imputation:dataset=Restaurant"),
    tuple(f"entity_matching:dataset={each}" for each in ("Beer", "Abt_Buy", "Dirty_iTunes_Amazon")),
    ("copyright:datatag=popular_books-prefix_length_125.json",),
    ("copyright:datatag=prompt_num_line_10-min_lines_20.json",),
    (
        "disinformation:capability=reiteration,topic=climate",
        "disinformation:capability=reiteration,topic=covid",
    ),
    ("disinformation:capability=wedging",),
    ("bbq:subject=all",),
    ("bold:subject=all",),
    ("real_toxicity_prompts",),
    ("synthetic_efficiency:num_prompt_tokens=256,num_output_tokens=16",),
)
# 3 trials each, as FlexGen's helm_run.py forces.
_FLEXGEN: tuple[tuple[str, ...], ...] = (
    ("wikifact:k=5,subject=plaintiff,num_train_trials=3",),
    ("wikifact:k=5,subject=instance_of,num_train_trials=3",),
    ("mmlu:subject=abstract_algebra,data_augmentation=canonical,num_train_trials=3",),
    ("mmlu:subject=us_foreign_policy,data_augmentation=canonical,num_train_trials=3",),
    ("synthetic_reasoning:mode=pattern_match,num_train_trials=3",),
    ("synthetic_reasoning_natural:difficulty=easy,num_train_trials=3",),
    ("summarization_xsum_sampled:temperature=0.3,num_train_trials=3",),
)
_SMOKE: tuple[tuple[str, ...], ...] = (
    ("synthetic_reasoning:mode=pattern_match,max_train_instances=2",),
    ("synthetic_reasoning_natural:difficulty=easy,max_train_instances=1",),
    ("dyck_language:num_parenthesis_pairs=3",),
    ("numeracy:relation=linear,max_train_instances=3",),
)
SUITES = {"core": _CORE, "targeted": _TARGETED, "flexgen7": _FLEXGEN, "smoke": _SMOKE}
SIZES = {"core": 1000, "targeted": 1000, "flexgen7": 1000, "smoke": 24}


def suite_entries(name: str, *, size: int | None = None) -> list[str]:
    """The run entries of a suite, each with its share of `size` instances."""
    if name not in SUITES:
        raise unknown_name("suite", name, SUITES)
    size = size or SIZES[name]
    entries = []
    for scenario in SUITES[name]:
        share = max(1, size // len(scenario))
        for entry in scenario:
            separator = "," if ":" in entry else ":"
            entries.append(f"{entry}{separator}max_eval_instances={share}")
    return entries
