"""Plan and trace: plain data with totals."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.plans import Choice, Phase, Plan, Trace, Traffic

PREFILL = Phase(
    name="prefill",
    seconds=2.0,
    busy_s={"host->device": 1.5, "device compute": 0.5},
    traffic=Traffic({("host->device", "weights"): 300}),
    num_tokens=512,
)
DECODE = Phase(
    name="decode",
    seconds=0.25,
    busy_s={"host->device": 0.125},
    traffic=Traffic({("host->device", "weights"): 50, ("device->host", "cache"): 4}),
)
COMMON = {"system": "generation", "title": "tiny", "machine": "atlas"}
BOTH_PHASES = {**COMMON, "phases": (PREFILL, DECODE)}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e9), min_size=1))
def test_the_bottleneck_is_the_resource_that_is_busy_longest(busy_s):
    bottleneck = Phase(name="decode", seconds=1.0, busy_s=busy_s).bottleneck
    assert busy_s[bottleneck] == max(busy_s.values())


def test_a_phase_without_resources_has_no_bottleneck():
    assert Phase(name="decode", seconds=1.0).bottleneck is None


@pytest.mark.parametrize("kind", [Plan, Trace])
def test_totals_are_sums_over_the_phases(kind):
    account = kind(**BOTH_PHASES)
    assert account.seconds == 2.25
    assert account.traffic == Traffic({("host->device", "weights"): 350, ("device->host", "cache"): 4})
    empty = kind(**COMMON)
    assert empty.seconds == 0
    assert empty.traffic == Traffic()


@pytest.mark.parametrize("kind", [Plan, Trace])
def test_a_phase_is_found_by_its_name(kind):
    account = kind(**BOTH_PHASES)
    assert account.phase("decode") is DECODE
    assert account.phase("finetune") is None


COMMON_RECORD = {
    **COMMON,
    "seconds": 0.25,
    "phases": [
        {
            "name": "decode",
            "seconds": 0.25,
            "busy_s": {"host->device": 0.125},
            "bytes": {"device->host": {"cache": 4}, "host->device": {"weights": 50}},
            "num_tokens": 0,
        }
    ],
    "bytes": {"device->host": {"cache": 4}, "host->device": {"weights": 50}},
    "peak_bytes": {"device": 9},
}


def _through_json(record: dict) -> dict:
    return json.loads(json.dumps(record, allow_nan=False))


def test_a_plan_is_serialisable_as_json():
    plan = Plan(
        **COMMON,
        phases=(DECODE,),
        peak_bytes={"device": 9},
        budget_bytes={"device": 10},
        choices=(
            Choice(name="codec", value="group4:64", reason="the link is slow"),
            Choice(name="a", value="b"),
        ),
    )
    choices = [
        {"name": "codec", "value": "group4:64", "reason": "the link is slow"},
        {"name": "a", "value": "b", "reason": ""},
    ]
    expected = {**COMMON_RECORD, "budget_bytes": {"device": 10}, "choices": choices}
    assert _through_json(plan.to_dict()) == plan.to_dict() == expected


def test_a_trace_is_serialisable_as_json():
    trace = Trace(**COMMON, phases=(DECODE,), peak_bytes={"device": 9}, notes=("one run",))
    assert _through_json(trace.to_dict()) == trace.to_dict() == {**COMMON_RECORD, "notes": ["one run"]}


def test_plans_with_equal_fields_are_equal():
    assert Plan(**BOTH_PHASES) == Plan(**BOTH_PHASES)
    assert Plan(**BOTH_PHASES) != Plan(**COMMON)
    assert Plan(**COMMON) != Trace(**COMMON)
