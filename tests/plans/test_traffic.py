"""Traffic is a value: it adds like a number per link and content."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.plans import Traffic

LINKS = ["device->host", "disk->host", "host->device"]
CONTENTS = ["activations", "cache", "weights"]

keys = st.tuples(st.sampled_from(LINKS), st.sampled_from(CONTENTS))
traffics = st.dictionaries(keys, st.integers(0, 2**60)).map(Traffic)
differences = st.dictionaries(keys, st.integers(-9, 9)).map(Traffic)


@given(traffics, traffics, traffics)
def test_addition_is_associative_and_commutative(a, b, c):
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + Traffic() == a


@given(traffics, traffics)
def test_subtraction_undoes_addition(a, b):
    assert (a + b) - b == a
    assert a - a == Traffic()


@given(differences, differences)
def test_adding_to_a_difference_keeps_what_is_still_negative(a, b):
    every = [(link, content) for link in LINKS for content in CONTENTS]
    expected = {key: a.size_bytes.get(key, 0) + b.size_bytes.get(key, 0) for key in every}
    assert a + b == Traffic(expected)


@given(traffics, st.integers(0, 5))
def test_n_times_equals_the_repeated_sum(traffic, times):
    repeated = Traffic()
    for _ in range(times):
        repeated = repeated + traffic
    assert times * traffic == repeated == Traffic.total([traffic] * times)


@given(st.dictionaries(keys, st.integers(0, 3)), st.randoms(use_true_random=False))
def test_equal_traffic_has_equal_hashes_whatever_the_order_and_the_zeros(sizes, random):
    shuffled = list(sizes.items())
    random.shuffle(shuffled)
    without_zeros = {key: count for key, count in shuffled if count}
    assert Traffic(sizes) == Traffic(without_zeros)
    assert len({Traffic(sizes), Traffic(without_zeros)}) == 1


def test_traffic_on_another_link_or_of_another_content_is_different():
    one = Traffic({("host->device", "weights"): 5})
    others = [
        Traffic({("device->host", "weights"): 5}),
        Traffic({("host->device", "cache"): 5}),
        Traffic({("host->device", "weights"): 6}),
    ]
    assert all(one != other for other in others)
    assert len({one, *others}) == 4


@given(traffics)
def test_to_dict_loses_nothing(traffic):
    nested = traffic.to_dict()
    assert traffic == Traffic(
        {(link, content): count for link, sizes in nested.items() for content, count in sizes.items()}
    )
    assert list(nested) == list(traffic.links)


@given(traffics)
def test_contents_and_links_divide_the_bytes_among_them(traffic):
    assert traffic.of("weights") + traffic.of("cache", "activations") == traffic
    assert traffic.of() == Traffic()
    for link in LINKS:
        assert traffic.on(link) == sum(traffic.of(content).on(link) for content in CONTENTS)
        assert (link in traffic.links) == (traffic.on(link) > 0)


def test_on_of_and_links_of_a_literal_example():
    traffic = Traffic(
        {("host->device", "weights"): 7, ("host->device", "cache"): 2, ("device->host", "cache"): 1}
    )
    assert traffic.on("host->device") == 9
    assert traffic.on("disk->host") == 0
    assert traffic.of("cache").to_dict() == {"device->host": {"cache": 1}, "host->device": {"cache": 2}}
    assert traffic.links == ("device->host", "host->device")


def test_a_traffic_cannot_be_changed_from_outside():
    sizes = {("host->device", "weights"): 7}
    traffic = Traffic(sizes)
    sizes["host->device", "weights"] = 8
    assert traffic.on("host->device") == 7
    with pytest.raises(TypeError):
        traffic.size_bytes["host->device", "weights"] = 9
