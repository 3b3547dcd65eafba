"""The paper's bytes from its dimensions, with the three corrections; and what the command says of them."""

import json

import pytest
from typer.testing import CliRunner

from capstan.cli.federate import federate
from capstan.errors import UsageError
from capstan.federation import CutDimensions, DeviceLink, TopK, Wire, traffic_report
from capstan.federation.traffic import published_account
from capstan.plans import Plan

PAPER = {"cut_width": 8192, "batch": 32, "num_parameters": 10_600_000}


@pytest.mark.parametrize(("devices", "gigabytes", "mebibytes"), [(32, 2.72, 64), (64, 5.45, 128)])
def test_the_papers_bytes_from_its_dimensions(devices, gigabytes, mebibytes):
    account = published_account(CutDimensions(num_devices=devices, **PAPER), 0.1)
    # 10.6 million parameters are rounded to three digits, half a unit of the last is 0.5 %.
    assert account["fedavg_bytes"] / 1e9 == pytest.approx(gigabytes, rel=5e-3)
    assert account["split_bytes"] == mebibytes * 2**20
    # floor(0.1 n) leaves out less than one element of 262144.
    assert account["sparse_bytes"] == pytest.approx(mebibytes / 10 * 2**20, rel=4e-5)


def report(index, values="float16", bottom=0, samples=74275, **wire):
    dimensions = CutDimensions(num_devices=32, num_bottom_parameters=bottom, num_samples=samples, **PAPER)
    return traffic_report(
        dimensions, Wire(sparsifier=TopK(keep=0.1), index=index, value_type=values, **wire), 0.1
    )


@pytest.mark.parametrize(
    ("index", "bottom", "percent"),
    [("rice", 0, 0.142), ("elias-fano", 0, 0.144), ("rice", 544, 0.147), ("bitmap", 0, 0.162)],
)
def test_with_positions_counted_16_bits_are_some_seventh_of_a_per_cent(index, bottom, percent):
    # Half a unit of the last digit.
    assert 100 * report(index, bottom=bottom)["per_iteration_vs_fedavg"] == pytest.approx(percent, abs=5e-4)


def test_by_epoch_the_ratio_is_as_many_times_larger_as_there_are_batches():
    told = report("rice")
    assert told["local_steps_per_epoch"] == pytest.approx(72.53, abs=0.005)
    assert told["per_epoch_vs_fedavg"] == pytest.approx(72.53 * told["per_iteration_vs_fedavg"], rel=1e-4)
    assert told["break_even_local_steps"] == pytest.approx(1 / told["per_iteration_vs_fedavg"])
    assert report("rice", samples=None)["per_epoch_bytes"] is None


def test_the_gradient_on_the_support_needs_no_positions():
    support, own = report("elias-fano"), report("elias-fano", downlink="top-k")
    assert own["index_bytes"] == 2 * support["index_bytes"]
    assert "index" not in support["bytes_by_kind"]["server->devices"]


def test_framing_is_below_two_per_cent():
    told = report("rice")
    framing = sum(kinds["framing"] for kinds in told["bytes_by_kind"].values())
    assert framing < 0.02 * (told["bytes_up"] + told["bytes_down"])


WORDS = "traffic --cut-width 8192 --batch 32 --keep 0.1 --parameters 10.6e6 --devices 32".split()


def test_the_command_prints_one_object():
    ran = CliRunner().invoke(federate, [*WORDS, "--json"])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told["verb"] == "federate traffic"
    kinds = told["bytes_by_kind"]
    assert told["bytes_up"] == sum(kinds["devices->server"].values())
    assert told["bytes_down"] == sum(kinds["server->devices"].values())
    assert told["index_bytes"] == kinds["devices->server"]["index"]
    assert told["published"]["split_bytes"] == 64 * 2**20
    plan = Plan.from_dict(told["plan"])
    assert plan.traffic.on("devices->server") == told["bytes_up"]
    assert {each.name for each in plan.alternatives} == {"dense split, 32 bits", "federated averaging"}


def test_the_command_explains_itself():
    ran = CliRunner().invoke(federate, [*WORDS, "--samples", "74275", "--bottom-parameters", "544"])
    assert ran.exit_code == 0
    for said in ("0.147% of a round", "federated averaging", "10.7% of a round", "bound"):
        assert said in ran.stdout


def test_dimensions_that_cannot_be_are_refused():
    for wrong, said in (
        ({"num_bottom_parameters": 20_000_000}, "bottom has"),
        ({"average_every": 0}, "average_every must be"),
        ({"num_samples": 3}, "do not reach"),
    ):
        with pytest.raises(UsageError, match=said):
            CutDimensions(num_devices=32, **PAPER, **wrong)
    with pytest.raises(UsageError, match="positive rates"):
        DeviceLink(up_bytes_per_s=0)
    ran = CliRunner().invoke(federate, ["traffic", "--keep", "2", *WORDS[1:3], *WORDS[3:5], *WORDS[7:]])
    assert isinstance(ran.exception, UsageError)
    ran = CliRunner().invoke(federate, [*WORDS[:-3], "10.5", *WORDS[-2:]])
    assert isinstance(ran.exception, UsageError)
    assert "whole number" in str(ran.exception)


def test_a_wire_that_cannot_be_is_refused():
    for wrong, said in (
        ({"downlink": "up"}, "downlink"),
        ({"value_type": "uint8"}, "value type"),
        ({"index": "zip"}, "index code"),
        ({"has_error_feedback": True}, "Error feedback"),
        ({"downlink": "top-k", "sparsifier": None}, "own top-k"),
    ):
        with pytest.raises(UsageError, match=said):
            Wire(**wrong)
