"""Bytes of a plan, which are formulas, are the ledger's."""

from pathlib import Path

import pytest

from capstan.plans import Plan, Trace, compare

FILE = str(Path(__file__).with_name("accounts_cases.py"))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_plans_bytes_are_the_traces(in_world, dtype):
    for rank, found in enumerate(in_world(FILE, "accounts", 3, [dtype])):
        assert len(found) == 19
        for name, (told, measured) in found.items():
            plan, trace = Plan.from_dict(told), Trace.from_dict(measured)
            assert plan.traffic == trace.traffic, name
            for planned, traced in zip(plan.phases, trace.phases, strict=True):
                assert (planned.name, planned.traffic, planned.counts) == (
                    traced.name,
                    traced.traffic,
                    traced.counts,
                )
            assert trace.seconds > 0
            assert f"rank {rank} of 3" in compare(plan, trace)


def test_a_plan_goes_on_from_a_loaded_state(in_world):
    for before, after in in_world(FILE, "resumed", 2):
        assert "scatter" not in str(before)
        assert "scatter" in str(after)
        for told, measured in (before, after):
            assert Plan.from_dict(told).traffic == Trace.from_dict(measured).traffic
