"""Predicted steps: never below their bounds, right in the extremes, and a reason for what is switched on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.data_parallel.names import ALGORITHMS
from capstan.data_parallel.planner import (
    Network,
    Workload,
    choose,
    choose_bucket_bytes,
    differs,
    explain_algorithms,
    plan_of,
    predict,
)
from capstan.errors import UsageError

SLOW = Network(num_ranks=4, bandwidth_bytes_per_s=12.5e6, latency_s=0.01)
FAST = Network(num_ranks=4, bandwidth_bytes_per_s=12.5e9, latency_s=1e-6)
WORK = Workload.even(5_000_000, compute_s=0.3)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([name for name in ALGORITHMS if name not in ("async",)]),
    ranks=st.integers(2, 32),
    rate=st.floats(1e6, 1e10),
    latency=st.floats(0, 0.2),
    elements=st.integers(1000, 10**8),
)
def test_a_step_takes_no_less_than_its_bytes_or_its_compute(name, ranks, rate, latency, elements):
    network = Network(num_ranks=ranks, bandwidth_bytes_per_s=rate, latency_s=latency)
    found = predict(name, Workload.even(elements, compute_s=0.3), network)
    assert found.step_s >= 0.3 * (1 - 1e-9)
    assert found.step_s >= found.sent_bytes / rate * (1 - 1e-9)


def test_bytes_are_the_formulas_and_headers():
    found = predict("gradient_allreduce", WORK, SLOW)
    buckets = len(WORK.bucket_elements)
    assert found.sent_bytes == 2 * 3 / 4 * 4 * 5_000_000 + 2 * 3 * 32 * buckets
    assert predict("decentralized", WORK, SLOW).sent_bytes == 4 * 5_000_000 + 32 * buckets
    assert predict("bytegrad", WORK, SLOW).sent_bytes < 0.2505 * (1 + 8 / 512) * found.sent_bytes


def test_a_fast_network_is_left_alone_and_a_slow_one_is_not():
    assert choose(WORK, FAST)[0] == "gradient_allreduce"
    chosen, _ = choose(WORK, SLOW)
    assert predict(chosen, WORK, SLOW).step_s < 0.5 * predict("bytegrad", WORK, SLOW).step_s


def test_why_several_ranks_are_slower_than_one_and_what_to_switch_on_is_said():
    text = explain_algorithms(WORK, SLOW)
    assert "4 ranks are slower than one" in text
    assert "Switch on" in text
    assert "slower than one" not in explain_algorithms(WORK, FAST)


def test_a_plan_says_why():
    plan = plan_of("gradient_allreduce", WORK, SLOW)
    assert plan.choices[0].reason.startswith("the network adds")
    assert (
        plan_of("gradient_allreduce", WORK, FAST).choices[0].reason == "the network is hidden behind compute"
    )


def test_buckets_are_smaller_than_everything_and_larger_than_latency_allows():
    size = choose_bucket_bytes("gradient_allreduce", 50_000_000, SLOW, compute_s=2.0, coding={})
    assert 2**18 <= size < 4 * 50_000_000


def test_a_measured_step_far_from_the_predicted_one_is_noticed():
    assert differs(1.0, 1.3)
    assert not differs(1.0, 1.1)


def test_a_network_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match="at least 2 ranks"):
        Network(num_ranks=1, bandwidth_bytes_per_s=1, latency_s=0)
