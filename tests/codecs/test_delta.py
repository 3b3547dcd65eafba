"""Both ends of a delta hold the same for ever, and lose nothing of what settles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.codecs import Delta, codec_from_name
from capstan.errors import InputError

CODECS = [
    "identity",
    "group1:16",
    "group2:32:symmetric:stochastic",
    "group3:8",
    "group6:64",
    "topk:0.1",
    "sign:8",
]


def _empty(end: Delta, values: torch.Tensor) -> torch.Tensor:
    return torch.empty(end.size(values), dtype=torch.uint8)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(CODECS),
    visits=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=25),
    restart=st.integers(0, 25),
    seed=st.integers(0, 2**31),
)
def test_both_ends_hold_the_same_bit_for_bit_in_any_order_of_visits_and_after_a_restart(
    name, visits, restart, seed
):
    codec, generator = codec_from_name(name), torch.Generator().manual_seed(seed)
    sender, receiver = Delta(codec, salt=1), Delta(codec, salt=2)
    for at, key in enumerate(visits):
        if at == restart:
            kept = sender.state_dict(), receiver.state_dict()
            sender, receiver = Delta(codec, salt=1), Delta(codec, salt=2)
            sender.load_state_dict(kept[0])
            receiver.load_state_dict(kept[1])
        values = torch.randn(5, 8, generator=generator)
        if key not in sender:
            sender.start(key, values)
            receiver.start(key, values)
            continue
        payload = _empty(sender, values)
        told = sender.encode(values, payload, key=key)
        heard = receiver.decode(payload, key=key)
        assert torch.equal(told, heard)
        assert torch.equal(sender.held(key), receiver.held(key))
        if name == "identity":
            # A difference and a sum of numbers below 8, each rounded to 2**-24 of them.
            torch.testing.assert_close(heard, values, atol=2 * 8 * 2.0**-24, rtol=0)


@pytest.mark.parametrize("name", ["group2:32", "group3:32:symmetric", "group1:8"])
def test_where_values_settle_what_is_held_comes_to_them(name):
    end, values = Delta(codec_from_name(name)), torch.randn(64, generator=torch.Generator().manual_seed(0))
    end.start("a", torch.zeros(64))
    errors = []
    for _ in range(60):
        end.encode(values, _empty(end, values), key="a")
        errors.append(float((values - end.held("a")).abs().max()))
    # Each change leaves at most a step of the last one's range: half of it with one bit, less with more.
    assert errors[-1] < 1e-3 * errors[0]


def test_values_that_were_never_sent_in_full_are_refused():
    end = Delta(codec_from_name("group2"))
    with pytest.raises(InputError, match=r"Nothing is held under 'a' yet: send it in full first"):
        end.encode(torch.ones(4), torch.empty(20, dtype=torch.uint8), key="a")
    end.start("a", torch.ones(4))
    end.forget("a")
    assert "a" not in end


def test_values_of_another_shape_are_refused():
    end = Delta(codec_from_name("group2"))
    end.start("a", torch.ones(4))
    with pytest.raises(InputError, match=r"Under 'a' both ends hold torch.float32 of shape \(4,\)"):
        end.encode(torch.ones(5), torch.empty(20, dtype=torch.uint8), key="a")
