"""BLiMP: pairs of a grammatical sentence and one that is not.

Source: Warstadt et al. 2020; HELM, `scenarios/blimp_scenario.py`.
"""

from collections.abc import Mapping

from capstan.errors import unknown_name
from capstan.evaluation.instances import TEST, Instance, choices
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario, required
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."

_BLIMP: Mapping[str, tuple[str, ...]] = {
    "island_effects": (
        "left_branch_island_simple_question",
        "sentential_subject_island",
        "wh_island",
        "coordinate_structure_constraint_object_extraction",
        "coordinate_structure_constraint_complex_left_branch",
        "adjunct_island",
        "complex_NP_island",
        "left_branch_island_echo_question",
    ),
    "anaphor_agreement": ("anaphor_gender_agreement", "anaphor_number_agreement"),
    "argument_structure": (
        "animate_subject_passive",
        "animate_subject_trans",
        "transitive",
        "passive_1",
        "intransitive",
        "passive_2",
        "causative",
        "drop_argument",
        "inchoative",
    ),
    "determiner_noun_agreement": (
        "determiner_noun_agreement_with_adj_irregular_2",
        "determiner_noun_agreement_1",
        "determiner_noun_agreement_with_adj_irregular_1",
        "determiner_noun_agreement_irregular_1",
        "determiner_noun_agreement_irregular_2",
        "determiner_noun_agreement_with_adjective_1",
        "determiner_noun_agreement_2",
        "determiner_noun_agreement_with_adj_2",
    ),
    "subject_verb_agreement": (
        "distractor_agreement_relative_clause",
        "irregular_plural_subject_verb_agreement_2",
        "irregular_plural_subject_verb_agreement_1",
        "regular_plural_subject_verb_agreement_1",
        "distractor_agreement_relational_noun",
        "regular_plural_subject_verb_agreement_2",
    ),
    "ellipsis": ("ellipsis_n_bar_1", "ellipsis_n_bar_2"),
    "control_raising": (
        "expletive_it_object_raising",
        "tough_vs_raising_1",
        "existential_there_subject_raising",
        "tough_vs_raising_2",
        "existential_there_object_raising",
    ),
    "quantifiers": (
        "existential_there_quantifiers_1",
        "superlative_quantifiers_1",
        "superlative_quantifiers_2",
        "existential_there_quantifiers_2",
    ),
    "irregular_forms": ("irregular_past_participle_verbs", "irregular_past_participle_adjectives"),
    "npi_licensing": (
        "sentential_negation_npi_licensor_present",
        "matrix_question_npi_licensor_present",
        "sentential_negation_npi_scope",
        "only_npi_licensor_present",
        "only_npi_scope",
        "npi_present_2",
        "npi_present_1",
    ),
    "binding": (
        "principle_A_domain_2",
        "principle_A_domain_3",
        "principle_A_case_1",
        "principle_A_case_2",
        "principle_A_reconstruction",
        "principle_A_c_command",
        "principle_A_domain_1",
    ),
    "filler_gap_dependency": (
        "wh_vs_that_with_gap",
        "wh_vs_that_no_gap",
        "wh_questions_object_gap",
        "wh_vs_that_no_gap_long_distance",
        "wh_questions_subject_gap",
        "wh_questions_subject_gap_long_distance",
        "wh_vs_that_with_gap_long_distance",
    ),
}
PARADIGMS = frozenset(name for names in _BLIMP.values() for name in names)


def load_blimp(data: DataFolder, *, phenomenon: str) -> list[Instance]:
    """Pairs of a grammatical sentence and one that is not. `phenomenon` is HELM's, or one paradigm."""
    if phenomenon not in _BLIMP and phenomenon not in PARADIGMS:
        raise unknown_name("phenomenon of BLiMP", phenomenon, [*_BLIMP, *PARADIGMS])
    instances = []
    for paradigm in _BLIMP.get(phenomenon, (phenomenon,)):
        name = f"{paradigm}.jsonl"
        name = name if data.exists(name) else f"data/{name}"
        for row in data.jsonl(name, '{"sentence_good", "sentence_bad"} on each line'):
            good, bad = required(row, "sentence_good", "sentence_bad", where=name)
            instances.append(Instance(input="", references=choices([good, bad], 0), split=TEST))
    return instances


def _blimp_spec(phenomenon: str, method: str = asking.ORIGINAL) -> RunSpec:
    return RunSpec(
        name=f"blimp:phenomenon={phenomenon},method={method}",
        scenario_spec=ScenarioSpec(
            class_name=_HELM + "blimp_scenario.BLiMPScenario", args={"phenomenon": phenomenon}
        ),
        adapter_spec=asking.multiple_choice(
            method, instructions="Please select the grammatical sentence.", empty_input=True
        ),
        metric_specs=asking.exact_match(),
        groups=("blimp",),
    )


SCENARIOS = (
    Scenario(
        name="blimp",
        folder="blimp",
        class_name=_HELM + "blimp_scenario.BLiMPScenario",
        description="Minimal pairs of English grammar (Warstadt et al. 2020)",
        load=load_blimp,
        run_spec=_blimp_spec,
        main_metric="exact_match",
        page="github.com/alexwarstadt/blimp",
    ),
)
