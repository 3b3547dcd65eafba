"""Names: every codec has one, and it leads back to the codec."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capstan.codecs import (
    Cast,
    Codec,
    GroupQuantised,
    Identity,
    MinMaxUInt8,
    RandomK,
    Sign,
    TopK,
    codec_from_name,
)
from capstan.codecs.casts import TARGETS
from capstan.codecs.groups import SCALE_DTYPES
from capstan.codecs.names import FAMILIES
from capstan.errors import UsageError

codecs = st.one_of(
    st.just(Identity()),
    st.builds(Cast, dtype=st.sampled_from(list(TARGETS.values()))),
    st.builds(MinMaxUInt8, clamped=st.booleans()),
    st.builds(Sign, block_size=st.integers(1, 10**8).map(lambda size: 8 * size)),
    *(
        st.builds(kind, fraction=st.floats(1e-9, 1), value_dtype=st.sampled_from(SCALE_DTYPES))
        for kind in (TopK, RandomK)
    ),
    st.builds(
        GroupQuantised,
        num_bits=st.integers(2, 8),
        group_size=st.integers(1, 10**9),
        dim=st.integers(-9, 9),
        symmetric=st.booleans(),
        rounding=st.sampled_from(["nearest", "stochastic"]),
        scale_dtype=st.sampled_from(SCALE_DTYPES),
    ),
)


@given(codecs)
def test_codec_from_name_inverts_name_exactly(codec):
    assert codec_from_name(codec.name) == codec


@given(codecs, codecs)
def test_different_codecs_have_different_names(one, other):
    assert (one == other) == (one.name == other.name)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("group4", "group4:64"),
        ("group8:64:float16", "group8:64"),
        ("group2:16:nearest:dim-1", "group2:16"),
        ("group8:32:symmetric:stochastic:float32:dim0", "group8:32:symmetric:stochastic:float32:dim0"),
    ],
)
def test_parts_with_a_default_may_be_left_out_or_written(written, canonical):
    assert codec_from_name(written).name == canonical


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("identiti", "identity"),
        ("grp4:64", "group4"),
        ("group9:64", "group"),
        ("cast:bfloat61", "cast:bfloat16"),
        ("identity:2", "identity"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(wrong, nearest):
    with pytest.raises(UsageError, match=f"Did you mean '{nearest}"):
        codec_from_name(wrong)


@pytest.mark.parametrize(
    "wrong",
    ["group4:", "group4:x", "group4:0", "group4:64:dim0:symmetric", "group4:64:float64", "group4:-1", ""],
)
def test_a_name_its_family_cannot_read_is_refused(wrong):
    with pytest.raises(UsageError):
        codec_from_name(wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_bits": 9},
        {"num_bits": 4, "group_size": 0},
        {"num_bits": 4, "rounding": "up"},
        {"num_bits": 4, "scale_dtype": torch.float64},
    ],
)
def test_settings_that_no_name_can_say_are_refused(settings):
    with pytest.raises(UsageError):
        GroupQuantised(**settings)


def test_a_cast_to_a_type_of_no_use_is_refused():
    with pytest.raises(UsageError, match=r"found torch\.int8"):
        Cast(dtype=torch.int8)


def test_every_family_is_reached_by_name():
    for family in FAMILIES:
        name = {"cast": "cast:float16", "topk": "topk:0.1", "randomk": "randomk:0.1"}.get(family, family)
        assert isinstance(codec_from_name(name), Codec)
