"""From logits to tokens: chance is a function of seed and step, and follows what was asked for."""

from collections import Counter

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest

from capstan.generation.runtime.sampling import Draw, choose, logprobs_of, uniform

SEEDS = st.integers(-(2**70), 2**70)


@given(SEEDS, st.integers(0, 2**40))
def test_uniform_is_a_number_from_zero_up_to_one_and_always_the_same(seed, index):
    value = uniform(seed, index)
    assert 0 <= value < 1
    assert uniform(seed, index) == value


def test_uniform_numbers_of_known_seeds_do_not_change_between_versions():
    assert [uniform(seed, index) for seed, index in ((0, 0), (0, 1), (1, 0), (-1, 7))] == [
        0.5079605879681605,
        0.4224192380508798,
        0.17601256256594233,
        0.8721947033883335,
    ]


@pytest.mark.parametrize("along", ["steps", "seeds", "answers"])
def test_uniform_numbers_are_uniform_and_neighbours_are_unrelated(along):
    draws = {
        "steps": lambda index: uniform(5, index),
        "seeds": lambda index: uniform(index, 3),
        "answers": lambda index: uniform(5 + index * 0x632BE59BD9B4E019, 0),
    }[along]
    values = [draws(index) for index in range(4096)]
    # The seeds are fixed, so this passes always or never; a good generator fails one such test in 10,000.
    assert kstest(values, "uniform").pvalue > 1e-4
    pairs = torch.tensor([values[:-1], values[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / 4096**0.5  # four standard errors


def _left_by_transformers(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """The probabilities that transformers samples from."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(draw.temperature)(None, logits)
    scores = TopKLogitsWarper(draw.top_k)(None, scores) if draw.top_k else scores
    return TopPLogitsWarper(draw.top_p)(None, scores).softmax(dim=-1)[0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (0.8, 7, 0.7)],
)
def test_samples_follow_the_distribution_that_transformers_samples_from(temperature, top_k, top_p):
    logits = 1.5 * torch.randn(1, 24, generator=torch.Generator().manual_seed(3))
    num_draws = 20_000
    draws = [Draw(temperature, top_k, top_p, seed=seed, step=seed % 5) for seed in range(num_draws)]
    seen = Counter(choose(logits.expand(num_draws, -1).clone(), draws).tolist())
    wanted = _left_by_transformers(logits, draws[0]) * num_draws
    possible = wanted > 0
    assert {token for token, _ in seen.items()} <= set(possible.nonzero()[:, 0].tolist())
    counted = torch.tensor([seen[token] for token in range(24)])[possible]
    # The seeds are fixed, so this passes always or never; a right sampler fails one case in 10,000.
    statistic = float(((counted - wanted[possible]) ** 2 / wanted[possible]).sum())
    assert statistic < chi2.ppf(1 - 1e-4, df=max(1, int(possible.sum()) - 1))


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20),
    st.floats(0.1, 4),
    st.one_of(st.tuples(st.integers(0, 6), st.just(1.0)), st.tuples(st.just(0), st.floats(0.01, 1))),
    SEEDS,
    st.integers(0, 50),
)
@example([-(2.0**-149), 0.0], 2.0, (0, 1.0), 0, 0)
@settings(deadline=None)
def test_a_sample_inverts_the_cumulative_distribution_at_the_uniform_number(
    logits, temperature, choice, seed, step
):
    top_k, top_p = choice
    (token,) = choose(torch.tensor([logits]), [Draw(temperature, top_k, top_p, seed, step)]).tolist()
    # The same in float64: likeliest first, until k tokens or the probability p are reached.
    ordered = torch.tensor(sorted(logits, reverse=True), dtype=torch.float64)
    cumulative = (ordered / temperature).softmax(0).cumsum(0)
    reached = [0.0, *cumulative.tolist()[:-1]]
    # 20 float32 additions of numbers up to 1 are off by 20 * 2**-24 = 1.2e-6 at most; closer than 1e-5 to an
    # edge, both neighbours are right.
    assume(all(abs(before - top_p) > 1e-5 for before in reached[1:]))
    num_kept = min(top_k or len(logits), sum(before < top_p for before in reached))
    target = uniform(seed, step) * float(cumulative[num_kept - 1])
    assume(all(abs(edge - target) > 1e-5 for edge in cumulative[: num_kept - 1].tolist()))
    place = sum(edge <= target for edge in cumulative[: num_kept - 1].tolist())
    # Division by the temperature rounds to 2**-24, at the least to 2**-150: closer logits than the tolerance
    # can become equal, and then either is the right one.
    assert logits[token] == pytest.approx(float(ordered[place]), rel=2**-22, abs=2**-146)


@given(st.integers(0, 2**32), st.integers(1, 6))
@settings(deadline=None)
def test_a_row_is_sampled_alike_alone_and_among_others(seed, num_rows):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, 40, generator=generator)
    kinds = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 3, 1.0), (1.3, 0, 0.5), (1.0, 9, 0.9), (0.0, 4, 0.3)]
    draws = [Draw(*kinds[row], seed=seed + row, step=row) for row in range(num_rows)]
    together = choose(logits.clone(), draws).tolist()
    alone = [choose(logits[row : row + 1].clone(), [draws[row]]).item() for row in range(num_rows)]
    assert together == alone


@pytest.mark.parametrize("draw", [Draw(0.0, 0, 1.0, 1, 0), Draw(3.0, 1, 1.0, 1, 0), Draw(1.0, 0, 1e-9, 1, 0)])
def test_temperature_zero_and_the_narrowest_choices_take_the_likeliest_token(draw):
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    draws = [draw._replace(seed=row) for row in range(50)]
    assert choose(logits.clone(), draws).tolist() == logits.argmax(dim=-1).tolist()


def test_a_token_ruled_out_by_minus_infinity_is_never_chosen():
    logits = torch.zeros(500, 4)
    logits[:, [0, 2]] = float("-inf")
    chosen = choose(logits, [Draw(1.0, 0, 1.0, seed=seed, step=0) for seed in range(500)])
    assert set(chosen.tolist()) == {1, 3}


def test_logprobs_come_with_as_many_likeliest_tokens_as_each_row_asked_for():
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    wanted = logits.log_softmax(dim=-1).tolist()
    first, second = logprobs_of(logits, [0, 0], [2, 0])
    assert (first.token, first.logprob) == (0, wanted[0][0])
    assert first.top == ((2, wanted[0][2]), (1, wanted[0][1]))
    assert (second.token, second.logprob, second.top) == (0, wanted[1][0], ())
    everything = logprobs_of(logits, [1, 1], [100, 100])
    assert [token for token, _ in everything[1].top] == [0, 1, 2]


@pytest.mark.parametrize("temperature", [1e-45, 1e-320, 1e-31])
def test_a_temperature_too_small_to_divide_by_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[0.0, 30.0, -5.0, 30.5]])
    draws = [Draw(temperature, 0, 1.0, seed, 0) for seed in range(8)]
    assert choose(logits.expand(8, 4), draws).tolist() == [3] * 8


def test_a_temperature_too_large_for_a_float32_samples_evenly():
    draws = [Draw(1e300, 0, 1.0, seed, 0) for seed in range(4000)]
    counts = Counter(choose(torch.tensor([[0.0, 30.0, -5.0, 30.5]]).expand(4000, 4), draws).tolist())
    statistic = sum((counts[token] - 1000) ** 2 / 1000 for token in range(4))
    assert statistic < chi2(3).isf(1e-4)


def test_tokens_that_must_not_come_do_not_and_the_others_keep_their_proportions():
    logits = torch.tensor([2.0, 1.0, 0.0, 3.0])
    draws = [Draw(1.0, 0, 1.0, seed, 0, banned=frozenset({3, 9})) for seed in range(4000)]
    counts = Counter(choose(logits.expand(4000, 4), draws).tolist())
    expected = (4000 * logits[:3].softmax(0)).tolist()
    assert set(counts) == {0, 1, 2}
    statistic = sum((counts[token] - wanted) ** 2 / wanted for token, wanted in enumerate(expected))
    assert statistic < chi2(2).isf(1e-4)
    greedy = Draw(0.0, 0, 1.0, 0, 0, banned=frozenset({3}))
    assert choose(logits[None], [greedy]).tolist() == [0]


def test_requests_without_a_seed_follow_the_models_distribution():
    # One draw for each of many requests: what a file of copies of one prompt asks for.
    from capstan.generation import Request
    from capstan.generation.runtime.sequences import Sequence

    logits = 1.5 * torch.randn(24, generator=torch.Generator().manual_seed(5))
    requests = [Request(prompt=[1], temperature=0.8, id=f"request-{number}") for number in range(6000)]
    sequences = [
        Sequence(
            request=request,
            request_index=0,
            answer=answer,
            prompt=[1],
            stop_tokens=frozenset(),
            tokenizer=None,
        )
        for request in requests
        for answer in (0, 1)
    ]
    tokens = choose(logits.expand(len(sequences), 24), [each.draw for each in sequences]).tolist()
    counts = Counter(tokens)
    expected = (len(tokens) * (logits / 0.8).softmax(0)).tolist()
    statistic = sum((counts[token] - wanted) ** 2 / wanted for token, wanted in enumerate(expected))
    # Seeds are made of the ids, so this passes always or never; fair draws fail one such test in 10,000.
    assert statistic < chi2(23).isf(1e-4)
