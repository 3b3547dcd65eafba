"""Shares by hand: how they are read, and how whole tensors realise them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import UsageError
from capstan.generation.planning.placement import TIERS, Placement, Wish, parse_wish, realised, spread

sizes_of_tensors = st.lists(st.integers(1, 10**9), min_size=1, max_size=60)
shares_of_tiers = (
    st.lists(st.integers(0, 20), min_size=3, max_size=3)
    .filter(any)
    .map(lambda parts: {tier: part / sum(parts) for tier, part in zip(TIERS, parts, strict=True)})
)


@given(sizes_of_tensors, shares_of_tiers)
def test_every_total_differs_from_its_share_by_at_most_two_of_the_largest_items(sizes, shares):
    tiers = spread(sizes, shares)
    for tier, share in shares.items():
        given_bytes = sum(size for each, size in zip(tiers, sizes, strict=True) if each == tier)
        # Floating-point shares of up to 60 GB are off by bytes at most.
        assert abs(given_bytes - share * sum(sizes)) <= 2 * max(sizes) + 60


@given(sizes_of_tensors, shares_of_tiers)
def test_a_share_of_zero_gets_nothing(sizes, shares):
    assert {shares[tier] for tier in spread(sizes, shares)}.isdisjoint({0.0})


@given(sizes_of_tensors, st.sampled_from(TIERS))
def test_one_tier_alone_gets_everything(sizes, tier):
    assert spread(sizes, {tier: 1.0}) == [tier] * len(sizes)


@given(shares_of_tiers)
def test_written_shares_are_read_back(shares):
    text = ",".join(f"{tier}:{share!r}" for tier, share in shares.items())
    assert parse_wish([f"weights={text}"]) == Wish(weights=shares)


@given(st.floats(0, 1), st.integers(1, 40))
def test_the_batches_that_are_attended_on_the_host_are_as_many_as_the_share_says_and_evenly_spread(
    share, num_batches
):
    placement = Placement(weights={}, cache=("host",), activations="device", host_attention=share)
    on_host = placement.host_batches(num_batches)
    count = round(share * num_batches)
    assert len(on_host) == count
    assert on_host <= set(range(num_batches))
    for start in range(num_batches):
        for end in range(start, num_batches + 1):
            fair = (end - start) * count / num_batches
            assert abs(len(on_host & set(range(start, end))) - fair) < 1


@given(st.floats(0, 1))
def test_a_written_share_of_attention_is_the_hosts(share):
    both = f"host:{share!r},device:{1 - share!r}"
    assert parse_wish([f"attention={both}"]) == Wish(attention=share)
    assert parse_wish([f"cache=host attention={','.join(reversed(both.split(',')))}"]).attention == share


@pytest.mark.parametrize(
    ("words", "wish"),
    [
        ([], Wish()),
        (["cache=host"], Wish(cache={"host": 1.0})),
        (["activations=disk", "attention=host"], Wish(activations="disk", attention=1.0)),
        (["attention=device"], Wish(attention=0.0)),
        (
            ["weights=disk cache=device:0.5,host:0.5"],
            Wish(weights={"disk": 1.0}, cache={"device": 0.5, "host": 0.5}),
        ),
    ],
)
def test_parts_may_come_in_one_word_or_in_several_and_unnamed_ones_stay_open(words, wish):
    assert parse_wish(words) == wish


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "wieghts=host",
            r"no thing to place 'wieghts'. Did you mean 'weights'\? Known: activations, attention",
        ),
        ("weights=hots", r"no place 'hots'. Did you mean 'host'\? Known: device, disk, host"),
        ("weights", "--place 'weights' says nothing; write for example weights=host"),
        ("cache=", "--place 'cache=' says nothing; write for example cache=host"),
        ("activations=host:1", "no place 'host:1'. Did you mean 'host'"),
        ("attention=disk", "Attention runs on 'device' or 'host', not on 'disk'"),
        ("attention=host:0.5,disk:0.5", "Attention runs on 'device' or 'host', not on 'disk'"),
        ("attention=host:0.5,device:0.4", "attention: the shares .* add up to 0.9; they must be at least 0"),
        ("attention=half", "no place 'half'"),
        ("weights=device:0.5,host", "weights: '' in 'host' is not a number; write device:0.3"),
        ("cache=device:half,host:0.5", "cache: 'half' in 'device:half' is not a number"),
        ("weights=device:0.5,host:0.6", "weights: the shares .* add up to 1.1; they must be at least 0"),
        ("weights=device:-0.5,host:1.5", "must be at least 0 and add up to 1, as in device:0.3,host:0.5"),
        ("weights=device:nan", "weights: .*nan.*"),
        ("weights=device:inf", "add up to inf"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_write_instead(word, message):
    with pytest.raises(UsageError, match=message):
        parse_wish([word])


def test_realised_shares_are_told_without_the_places_that_have_nothing():
    assert realised(["device", "disk", "device"], [1, 6, 1]) == "device 25%, disk 75%"
    assert realised([], []) == ""
