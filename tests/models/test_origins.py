"""Named tensors are followed through whatever is computed from them."""

import torch

from capstan.models.origins import Origins


def test_a_result_depends_on_what_its_arguments_depend_on():
    with Origins() as origins:
        one, other = (origins.name(torch.ones(2, 3), name) for name in ("one", "other"))
        assert origins.of(one @ other.T) == {"one", "other"}
        assert origins.of(one[0].view(3, 1).expand(3, 5)) == {"one"}
        assert origins.of(torch.ones(2)) == set()
        assert origins.of(((one * 2, 3), {"key": [other]})) == {"one", "other"}


def test_what_is_written_in_place_is_seen_through_every_view():
    with Origins() as origins:
        one, mask = origins.name(torch.ones(3), "one"), torch.zeros(2, 3)
        mask[1].copy_(one)
        assert origins.of(mask) == {"one"}
        assert origins.of(mask.T) == {"one"}
        assert origins.of(one) == {"one"}


def test_a_shape_alone_is_no_dependence_and_new_values_are_not_their_model_s():
    with Origins() as origins:
        one = origins.name(torch.ones(2, 3), "one")
        for fresh in (
            torch.arange(one.shape[1]),
            torch.zeros_like(one),
            one.new_ones(4),
            torch.empty_like(one),
        ):
            assert origins.of(fresh) == set()
        assert origins.of(torch.zeros_like(one) + one) == {"one"}


def test_a_number_taken_out_of_a_tensor_is_noted():
    with Origins() as origins:
        one, plain = origins.name(torch.ones(2), "one"), torch.ones(2)
        assert plain.sum().item() == 2.0
        assert origins.decided == set()
        assert bool((one > 0).all())
        assert origins.decided == {"one"}


def test_a_named_tensor_depends_on_nothing_else():
    with Origins() as origins:
        one = origins.name(torch.ones(2), "one")
        assert origins.of(origins.name(one * 2, "other")) == {"other"}
