"""Plan and trace: plain data with totals."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import InputError
from capstan.plans import Alternative, Choice, Phase, Plan, Trace, Traffic, link_name, rank_link

PREFILL = Phase(
    name="prefill",
    seconds=2.0,
    busy_s={"host->device": 1.5, "device compute": 0.5},
    traffic=Traffic({("host->device", "weights"): 300}),
    counts={"tokens": 512},
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
            "counts": {},
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
        decision={"groups": [[0, 1]]},
        bound="the link",
        alternatives=(Alternative(name="contiguous", seconds=2.5, reason="dearer"),),
    )
    choices = [
        {"name": "codec", "value": "group4:64", "reason": "the link is slow"},
        {"name": "a", "value": "b", "reason": ""},
    ]
    expected = {
        **COMMON_RECORD,
        "budget_bytes": {"device": 10},
        "choices": choices,
        "decision": {"groups": [[0, 1]]},
        "bound": "the link",
        "alternatives": [{"name": "contiguous", "seconds": 2.5, "reason": "dearer"}],
    }
    assert _through_json(plan.to_dict()) == plan.to_dict() == expected


def test_a_trace_is_serialisable_as_json():
    trace = Trace(**COMMON, phases=(DECODE,), peak_bytes={"device": 9}, notes=("one run",))
    assert _through_json(trace.to_dict()) == trace.to_dict() == {**COMMON_RECORD, "notes": ["one run"]}


def test_plans_with_equal_fields_are_equal():
    assert Plan(**BOTH_PHASES) == Plan(**BOTH_PHASES)
    assert Plan(**BOTH_PHASES) != Plan(**COMMON)
    assert Plan(**COMMON) != Trace(**COMMON)


names = st.text(min_size=1, max_size=4)
seconds = st.floats(0, 1e9)
traffics = st.dictionaries(st.tuples(names, names), st.integers(0, 2**60), max_size=3).map(Traffic)
phases = st.builds(
    Phase,
    name=names,
    seconds=seconds,
    busy_s=st.dictionaries(names, seconds, max_size=2),
    traffic=traffics,
    counts=st.dictionaries(st.sampled_from(["tokens", "samples", "rows"]), st.integers(0, 2**60)),
)
common = {
    "system": names,
    "title": names,
    "machine": names,
    "phases": st.lists(phases, max_size=2).map(tuple),
    "peak_bytes": st.dictionaries(names, st.integers(0, 2**60), max_size=2),
}
plans = st.builds(
    Plan,
    **common,
    choices=st.lists(st.builds(Choice, name=names, value=names, reason=names), max_size=2).map(tuple),
    budget_bytes=st.dictionaries(names, st.integers(0, 2**60), max_size=2),
    decision=st.dictionaries(names, st.lists(st.integers()), max_size=2),
    bound=names,
    alternatives=st.lists(st.builds(Alternative, name=names, seconds=seconds, reason=names)).map(tuple),
)
traces = st.builds(Trace, **common, notes=st.lists(names, max_size=2).map(tuple))


@given(st.one_of(plans, traces))
def test_an_account_survives_json(account):
    assert type(account).from_dict(_through_json(account.to_dict())) == account


@pytest.mark.parametrize("kind", [Plan, Trace])
@pytest.mark.parametrize("field", ["system", "phases", "peak_bytes"])
def test_what_lacks_a_field_is_no_account(kind, field):
    told = kind(**BOTH_PHASES).to_dict()
    del told[field]
    with pytest.raises(InputError, match=f"not a {kind.__name__.lower()} .* '{field}'"):
        kind.from_dict(told)


def test_what_is_of_another_type_is_no_account():
    with pytest.raises(InputError, match="not a plan"):
        Plan.from_dict({**Plan(**BOTH_PHASES).to_dict(), "phases": 3})


def test_links_are_named_from_source_to_target():
    assert link_name("host", "device") == "host->device"
    assert rank_link(0, 12) == "rank 0->rank 12"
