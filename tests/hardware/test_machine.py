import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import InputError, UsageError
from capstan.hardware import Device, Link, Machine

rates = st.floats(min_value=1e-3, max_value=1e18)
latencies = st.floats(min_value=0, max_value=1e3)
sizes = st.integers(min_value=0, max_value=2**62)
dtypes = st.sampled_from(["float32", "bfloat16", "float16"])


def devices_named(name: str) -> st.SearchStrategy[Device]:
    return st.builds(
        Device,
        name=st.just(name),
        kind=st.sampled_from(["cuda", "cpu", "host", "disk"]),
        memory_bytes=sizes,
        matmul_flops_per_s=st.dictionaries(dtypes, rates),
        memory_bandwidth_bytes_per_s=rates,
        identity=st.text(max_size=10),
    )


def links_between(source: str, target: str) -> st.SearchStrategy[Link]:
    return st.builds(
        Link,
        source=st.just(source),
        target=st.just(target),
        bandwidth_bytes_per_s=rates,
        latency_s=latencies,
        pageable_bandwidth_bytes_per_s=st.none() | rates,
        duplex_bandwidth_bytes_per_s=st.none() | rates,
    )


machines = st.builds(
    Machine,
    name=st.text(max_size=10),
    devices=st.tuples(devices_named("device"), devices_named("host"), devices_named("disk")),
    links=st.tuples(links_between("host", "device"), links_between("disk", "host")),
    cores=st.integers(min_value=1, max_value=1024),
    probed_at=st.dates().map(lambda day: day.isoformat()),
    versions=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    notes=st.lists(st.text(max_size=20), max_size=3).map(tuple),
)


@given(machines)
def test_json_gives_back_an_equal_machine(machine: Machine) -> None:
    assert Machine.from_json(machine.to_json()) == machine


def test_a_machine_can_be_hashed_and_sent_to_another_process(machine: Machine) -> None:
    assert hash(machine) == hash(pickle.loads(pickle.dumps(machine)))
    assert pickle.loads(pickle.dumps(machine)) == machine


@given(links_between("a", "b"), sizes, sizes)
def test_more_bytes_never_take_less_time(link: Link, first: int, second: int) -> None:
    few, many = sorted((first, second))
    assert link.seconds(few) <= link.seconds(many)


def test_seconds_are_latency_plus_size_over_bandwidth() -> None:
    link = Link(source="a", target="b", bandwidth_bytes_per_s=100.0, latency_s=0.5)
    assert link.seconds(50) == 1.0
    assert link.seconds(0) == 0.0


@pytest.mark.parametrize("size", [-1, math.nan])
def test_a_transfer_of_an_impossible_size_is_refused(size: float) -> None:
    link = Link(source="a", target="b", bandwidth_bytes_per_s=1.0, latency_s=0.0)
    with pytest.raises(UsageError, match="does not exist"):
        link.seconds(size)


def test_devices_and_links_are_found_by_name(machine: Machine) -> None:
    assert machine.device("disk").kind == "disk"
    assert machine.link("device", "host").bandwidth_bytes_per_s == 5e9


def test_an_unknown_name_suggests_the_nearest(machine: Machine) -> None:
    with pytest.raises(UsageError, match=r"no device 'hots'. Did you mean 'host'"):
        machine.device("hots")
    with pytest.raises(UsageError, match="no link 'disk -> device'"):
        machine.link("disk", "device")


def test_facts_are_frozen_and_keep_no_dict_of_the_caller() -> None:
    given_rates = {"float32": 1e9}
    device = Device(
        name="d", kind="cpu", memory_bytes=1, matmul_flops_per_s=given_rates, memory_bandwidth_bytes_per_s=1.0
    )
    given_rates["float32"] = 2.0
    assert device.matmul_flops_per_s == {"float32": 1e9}
    with pytest.raises(FrozenInstanceError):
        device.memory_bytes = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_bytes": -1},
        {"memory_bandwidth_bytes_per_s": 0.0},
        {"memory_bandwidth_bytes_per_s": math.inf},
        {"matmul_flops_per_s": {"float32": math.nan}},
        {"kind": "gpu"},
    ],
)
def test_impossible_devices_are_refused(machine: Machine, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        replace(machine.device("host"), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"latency_s": -1e-9},
        {"latency_s": math.nan},
        {"bandwidth_bytes_per_s": 0.0},
        {"pageable_bandwidth_bytes_per_s": -1.0},
        {"duplex_bandwidth_bytes_per_s": math.inf},
    ],
)
def test_impossible_links_are_refused(machine: Machine, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        replace(machine.link("host", "disk"), **wrong)


def test_impossible_machines_are_refused(machine: Machine) -> None:
    with pytest.raises(UsageError, match=r"come twice: device"):
        replace(machine, devices=machine.devices + machine.devices[:1])
    with pytest.raises(UsageError, match=r"come twice: host -> device"):
        replace(machine, links=machine.links + machine.links[:1])
    with pytest.raises(UsageError, match="no device 'disk'"):
        replace(machine, devices=machine.devices[:2])
    with pytest.raises(UsageError, match="0 cores"):
        replace(machine, cores=0)
    with pytest.raises(UsageError, match="ISO date"):
        replace(machine, probed_at="yesterday")


def test_a_profile_cut_anywhere_is_refused(machine: Machine) -> None:
    text = machine.to_json().rstrip()
    for end in range(len(text)):
        with pytest.raises(InputError, match="truncated or damaged"):
            Machine.from_json(text[:end])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "capstan.plan", "should have format 'capstan.machine' but has 'capstan.plan'"),
        ("version", 2, "this library reads version 1"),
        ("version", True, "this library reads version 1"),
        ("name", 7, "'name' should be a text but is 7"),
        ("cores", 1.5, "'cores' should be a whole number"),
        ("cores", True, "'cores' should be a whole number"),
        ("cores", 0, "describes no possible machine"),
        ("probed_at", "soon", "ISO date"),
        ("devices", {}, "'devices' should be a list of objects"),
        ("links", [1], "'links' should be a list of objects"),
        ("versions", {"a": 1}, "'versions' should be an object of texts"),
        ("notes", "a", "'notes' should be a list of texts"),
        ("colour", "red", "unknown fields: colour"),
    ],
)
def test_a_wrong_field_is_named(machine: Machine, field: str, value: object, message: str) -> None:
    record = machine.as_dict() | {field: value}
    with pytest.raises(InputError, match=message):
        Machine.from_json(json.dumps(record), source="x.json")


@pytest.mark.parametrize("field", ["format", "version", "name", "cores", "devices", "links", "notes"])
def test_a_missing_field_is_named(machine: Machine, field: str) -> None:
    record = machine.as_dict()
    del record[field]
    with pytest.raises(InputError, match=field):
        Machine.from_dict(record)


def test_an_error_inside_a_list_says_where(machine: Machine) -> None:
    record = machine.as_dict()
    record["links"][1]["latency_s"] = "fast"
    with pytest.raises(InputError, match=r"links\[1\]: 'latency_s' should be a finite number but is 'fast'"):
        Machine.from_dict(record)
    record = machine.as_dict()
    record["devices"][0]["matmul_flops_per_s"] = {"float32": None}
    with pytest.raises(InputError, match=r"devices\[0\]: 'matmul_flops_per_s' should be an object of finite"):
        Machine.from_dict(record)
    record = machine.as_dict()
    record["devices"][2]["weight_kg"] = 1
    with pytest.raises(InputError, match=r"devices\[2\] has unknown fields: weight_kg"):
        Machine.from_dict(record)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_are_no_measurement_are_refused(machine: Machine, number: str) -> None:
    text = machine.to_json().replace("20000000000.0", number, 1)
    with pytest.raises(InputError):
        Machine.from_json(text)


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "", '{"a": 1, "a": 2}'])
def test_text_that_is_no_single_object_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"x\.json should hold one JSON object"):
        Machine.from_json(text, source="x.json")


def test_values_print_as_a_person_would_say_them(machine: Machine) -> None:
    assert (
        repr(machine.device("host"))
        == "Device(host, host, 8.00 GiB free at 20.00 GB/s, float32 0.10 TFLOP/s)"
    )
    assert repr(machine.link("disk", "host")) == "Link(disk -> host, 1.00 GB/s, 100 us)"
    assert repr(machine) == (
        "Machine(atlas: device (cpu) 8.00 GiB, host (host) 8.00 GiB, disk (disk) 1024.00 GiB, 2 cores, "
        "probed 2026-11-23)"
    )
