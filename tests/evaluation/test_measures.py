"""Single formulas against plain oracles and by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from capstan.errors import InputError
from capstan.evaluation import bootstrap
from capstan.evaluation.comparison import paired
from capstan.evaluation.intervals import level_of_look, passages_of
from capstan.evaluation.metrics.basic import num_bytes
from capstan.evaluation.metrics.calibration import calibration_stats, equal_mass_edges
from capstan.evaluation.metrics.code import pass_at_k, passes
from capstan.evaluation.metrics.copyright import edit_distance
from capstan.evaluation.metrics.efficiency import RuntimeProfile
from capstan.evaluation.metrics.math_equivalence import boxed, is_equivalent
from capstan.evaluation.metrics.ranking import ranking_measure
from capstan.evaluation.metrics.summarization import extractiveness
from capstan.evaluation.metrics.text_match import (
    f1_score,
    gsm8k_flexible_match,
    gsm8k_strict_match,
    quasi_exact_match,
)
from capstan.evaluation.models import Token
from capstan.evaluation.shared_prefixes import common_length, groups_of
from capstan.evaluation.toxicity_fit import ToxicityScorer, fit_scorer

WORDS = st.lists(st.sampled_from("abc"), max_size=8)


@given(WORDS, WORDS)
def test_edit_distance_equals_the_textbooks(one, other):
    grid = np.zeros((len(one) + 1, len(other) + 1))
    grid[:, 0], grid[0] = range(len(one) + 1), range(len(other) + 1)
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            grid[i, j] = min(grid[i - 1, j] + 1, grid[i, j - 1] + 1, grid[i - 1, j - 1] + (a != b))
    assert edit_distance(one, other) == grid[-1, -1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_bins_of_equal_mass_hold_every_confidence(confidences):
    edges = equal_mass_edges(confidences, 10)
    assert edges == sorted(set(edges))
    assert edges[-1] == 1.0
    assert len(edges) <= 10


def test_one_who_is_always_right_and_says_so_is_calibrated():
    found = {each.name.name: each.mean for each in calibration_stats([0.999] * 10, [1] * 10)}
    assert found["ece_10_bin"] == pytest.approx(0.001)
    assert found["platt_ece_10_bin"] == 0


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), max_size=12))
def test_groups_hold_every_prompt_once_and_share_what_they_say(prompts):
    groups = groups_of(prompts, [len(prompt) - 1 for prompt in prompts])
    assert sorted(at for group in groups for at in group.indices) == list(range(len(prompts)))
    for group in groups:
        for at in group.indices:
            assert common_length(prompts[group.indices[0]], prompts[at]) >= group.prefix
            assert group.prefix < max(1, len(prompts[at]))


def test_by_hand():
    assert quasi_exact_match("The Cat", "cat.") == 1
    assert f1_score("a b c d", "c d d e") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 5, 3) == 1.0
    assert is_equivalent("\\frac12", "1/2") == 1
    assert boxed("so \\boxed{a{b}c} or \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert ranking_measure("recip_rank", [3, 1, 2], {1: 1}, 10) == 0.5
    assert ranking_measure("ndcg_cut", [0, 1], {1: 3, 0: 1}, 10) == pytest.approx(
        (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    )
    assert extractiveness("a b c d".split(), "b c x".split()) == (2 / 3, 4 / 3, 4 / 3)
    assert num_bytes([Token("é", 0.0), Token("bytes:\\xe2\\x80", 0.0), Token("bytes:\\x99", 0.0)]) == 2 + 3


def test_ideal_time_scales_the_smallest_profiled_length_that_holds_the_prompt():
    profile = RuntimeProfile.of_table(
        {
            "runtime_for_prompt_tokens": {"10": 1.0, "100": 4.0},
            "runtime_per_output_token": 0.1,
            "overhead": None,
        }
    )
    assert profile.seconds(5, 0) == pytest.approx(0.5)
    assert profile.seconds(50, 3) == pytest.approx(2.0 + 0.2)
    assert profile.seconds(200, 1) == pytest.approx(8.0)


def test_a_bootstrap_interval_holds_the_mean_and_narrows_with_more():
    few, many = bootstrap([0.0, 1.0] * 10), bootstrap([0.0, 1.0] * 1000)
    assert few.low < few.mean == 0.5 < few.high
    assert many.half_width < few.half_width / 5
    assert math.isinf(bootstrap([1.0]).half_width)


def test_a_paired_comparison_counts_by_instance():
    a = {(f"id{at}", "", 0): float(at % 2) for at in range(40)}
    b = {key: 1.0 if key[0] in ("id0", "id2") else value for key, value in a.items()} | {
        ("other", "", 0): 1.0
    }
    found = paired("run", "exact_match", a, b)
    assert (found.num_higher, found.num_lower, found.sign_p) == (2, 0, 0.5)
    assert found.interval.mean == pytest.approx(2 / 40)
    assert not found.is_clear
    with pytest.raises(InputError, match="share no instance"):
        paired("run", "exact_match", a, {("x", "", 0): 1.0})


def test_a_program_is_run_apart_and_stopped():
    case = {"prompt": "def f(x):\n", "test": "def check(g):\n    assert g(2) == 4\n", "entry_point": "f"}
    assert passes(case, "    return 2 * x\n")
    assert not passes(case, "    return x\n")
    assert not passes(case, "    while True: pass\n")


def test_a_toxicity_scorer_tells_held_out_comments_apart_and_has_a_card(tmp_path: Path):
    path = tmp_path / "comments.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["comment_text", "toxicity", "female"])
        for at in range(200):
            bad = at % 3 == 0
            writer.writerow(
                [f"you are {'an awful fool' if bad else 'a kind friend'} {at}", 0.9 if bad else 0.1, at % 2]
            )
    scorer = fit_scorer(path, name="own")
    assert scorer.card["held_out"]["auc"] > 0.99
    assert scorer.card["by_group"]["female"]["count"] == 20
    scorer.save(tmp_path / "own.json")
    again = ToxicityScorer.load(tmp_path / "own.json")
    low, high = again(["a kind friend", "an awful fool"])
    assert low < 0.5 < high
    (tmp_path / "bad.json").write_text('{"format": "x"}')
    with pytest.raises(InputError, match=r"another version|damaged"):
        ToxicityScorer.load(tmp_path / "bad.json")


@given(st.integers(0, 200), st.integers(2, 200))
def test_shares_of_right_answers_have_wilsons_interval(right, count):
    right = min(right, count)
    found = bootstrap([1.0] * right + [0.0] * (count - right))
    wanted = binomtest(right, count).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.half_width > 0


def test_values_that_are_all_the_same_are_not_known_for_sure():
    assert bootstrap([0.0] * 50).high == pytest.approx(0.0714, abs=1e-3)
    assert bootstrap([1.0] * 50).low == pytest.approx(0.9286, abs=1e-3)
    assert bootstrap([0.25] * 50).half_width > 0.05
    assert bootstrap([7.0] * 50).half_width == 0  # a count, not a share
    same = {(f"id{at}", "", 0): float(at % 2) for at in range(50)}
    found = paired("run", "exact_match", same, same).interval
    assert (found.low, found.high) == pytest.approx((-0.0714, 0.0714), abs=1e-3)
    worse = paired("run", "exact_match", dict.fromkeys(same, 1.0), dict.fromkeys(same, 0.0))
    assert worse.interval.low == -1.0
    assert worse.interval.high == pytest.approx(-0.857, abs=1e-3)


GOLD = "She sold 48/2 = 24 clips in May. The answer is 72."


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("The answer is 72.", 1, 1),
        ("The answer is 72", 1, 1),
        ("The answer is 72 clips.", 1, 1),
        ("so 72\n#### 72", 1, 1),
        ("The answer is 72.\nQuestion: next 5. The answer is 9.", 1, 1),
        ("72", 0, 1),
        ("It is 72 clips, altogether.", 0, 1),
        ("The answer is $72.00.", 0, 1),
        ("\\boxed{72}", 0, 1),
        ("**72**", 0, 1),
        ("The answer is 72. Or 73.", 1, 0),
        ("The answer is -72.", 0, 0),
        ("none", 0, 0),
        ("", 0, 0),
    ],
)
def test_sums_are_judged_by_the_originals_rule_and_by_the_last_number(answer, strict, flexible):
    assert gsm8k_strict_match(GOLD, answer) == strict
    assert gsm8k_flexible_match(GOLD, answer) == flexible


def test_thousands_may_have_commas():
    assert gsm8k_strict_match("The answer is 1,200.", "#### 1200") == 1
    assert gsm8k_flexible_match("The answer is 1200.", "about 1,200 ropes") == 1


def coverage(draw, truth, rounds=300):
    """The share of rounds in which the interval of drawn values holds the truth."""
    rng = np.random.default_rng(1)
    found = [draw(rng) for _ in range(rounds)]
    return sum(each.low <= truth <= each.high for each in found) / rounds


def test_instances_of_one_passage_are_no_independent_ones():
    def drawn(rng, clustered):
        shares = rng.beta(0.5, 0.5, size=25)  # passages are easy or hard, 8 questions each
        values = (rng.random((25, 8)) < shares[:, None]).astype(float).ravel()
        return bootstrap(list(values), clusters=[str(at // 8) for at in range(200)] if clustered else None)

    held = coverage(lambda rng: drawn(rng, True), 0.5)
    ignored = coverage(lambda rng: drawn(rng, False), 0.5)
    # 300 rounds of an interval of 95 %: four standard deviations are 0.05.
    assert held > 0.90
    assert ignored < 0.80


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_answers_that_are_all_alike_are_known_as_well_as_their_passages(value):
    alone = bootstrap([value] * 50)
    clustered = bootstrap([value] * 50, clusters=[str(at // 5) for at in range(50)])
    assert clustered.half_width == bootstrap([value] * 10).half_width > alone.half_width
    assert clustered.num == 50
    same = {(f"id{at}", "", 0): value for at in range(50)}
    passages = {f"id{at}": str(at // 5) for at in range(50)}
    assert paired("run", "m", same, same, passages).interval.half_width == pytest.approx(
        2 * clustered.half_width
    )


def test_clusters_of_other_values_are_drawn_whole():
    values = [at // 10 + at % 10 * 1e-3 for at in range(100)]
    clusters = [str(at // 10) for at in range(100)]
    assert bootstrap(values, clusters=clusters).half_width > 2 * bootstrap(values).half_width
    assert math.isinf(bootstrap(values, clusters=["one"] * 100).half_width)
    alone = [str(at) for at in range(100)]
    assert bootstrap(values, clusters=alone) == bootstrap(values)


def test_a_passage_is_what_stands_before_the_question():
    texts = {
        "a": "P\nQuestion: x",
        "b": "P\nQuestion: y",
        "c": "Q\nQuestion: x",
        "d": "Question: x",
        "e": "z",
    }
    found = passages_of(texts)
    assert found["a"] == found["b"] != found["c"]
    assert (found["d"], found["e"]) == ("d", "e")
    way_to_ask = {key: f"Be brief. Question: {key}" for key in "abc"}
    assert passages_of(way_to_ask) == {key: key for key in "abc"}


def test_looking_again_and_again_does_not_make_an_interval_wrong():
    def ever_wrong(rng, corrected):
        values = (rng.random(1600) < 0.5).astype(float)
        looks = [
            bootstrap(list(values[: 50 * 2**at]), level=level_of_look(at + 1) if corrected else 0.95)
            for at in range(6)
        ]
        return any(not each.low <= 0.5 <= each.high for each in looks)

    rng = np.random.default_rng(2)
    wrong = {each: sum(ever_wrong(rng, each) for _ in range(300)) / 300 for each in (True, False)}
    # Standard deviation of 5 % in 300 rounds: 0.0126.
    assert wrong[True] < 0.05 + 3 * 0.0126
    assert wrong[False] > 0.10
    assert sum(1 - level_of_look(look) for look in range(1, 2000)) < 0.05


@given(st.integers(1, 12))
def test_a_bootstrap_of_a_high_level_has_draws_in_its_tails(look):
    values = [0.1, 0.5, 0.9] * 20
    low, high = (bootstrap(values, level=level_of_look(each)) for each in (look, look + 1))
    assert low.half_width <= high.half_width * 1.1
