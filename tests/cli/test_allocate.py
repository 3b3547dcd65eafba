import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from capstan.allocation import regions_on_a_globe
from capstan.cli.allocate import allocate
from capstan.errors import CapstanError
from capstan.plans import Plan

app = typer.Typer()
app.command("allocate")(allocate)
runner = CliRunner()


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.yaml"
    path.write_text(regions_on_a_globe(4, devices_per_region=2).to_yaml())
    return path


def run(*words: object) -> str:
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def record(*words: object) -> dict[str, Any]:
    told = json.loads(run(*words, "--json"))
    assert isinstance(told, dict)
    return told


def test_json_tells_layout_price_and_plan_and_evaluate_prices_it_again(tmp_path: Path) -> None:
    told = record("--scenario", "worldwide", "--cost-model", "paper", "--seed", 5)
    assert told.keys() == {
        "verb", "scenario", "cluster", "layout", "cost_s", "data_parallel_s", "pipeline_s", "search_s",
        "seed", "plan",
    }  # fmt: skip
    assert (told["verb"], told["scenario"], told["seed"]) == ("allocate", "worldwide", 5)
    assert told["cost_s"] == pytest.approx(49.218380053128435, abs=1e-9)
    assert told["cost_s"] == told["data_parallel_s"] + told["pipeline_s"]
    assert Plan.from_dict(told["plan"]).decision["groups"] == told["layout"]["groups"]
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(told["layout"]))
    again = record("--scenario", "worldwide", "--cost-model", "paper", "--evaluate", path)
    assert again["cost_s"] == told["cost_s"]
    assert again["layout"] == told["layout"]


def test_the_table_names_what_binds_and_every_stage(net: Path, tmp_path: Path) -> None:
    svg = tmp_path / "map.svg"
    text = run(net, "--stages", 4, "--svg", svg)
    for words in (
        "allocation on 8 devices",
        "exhaustive",
        "bound: data parallel",
        "second best",
        "stage 3: region",
    ):
        assert words in text
    assert svg.read_text().startswith("<svg ")


def test_devices_of_a_layout_are_named_or_numbered(net: Path, tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text('{"groups": [[0, 2, 4, 6], [1, 3, 5, 7]]}')
    by_number = record(net, "--evaluate", path)
    names = by_number["layout"]["groups"]
    path.write_text(json.dumps({"groups": names[::-1]}))
    assert record(net, "--evaluate", path)["cost_s"] == by_number["cost_s"]


def failure(*words: object) -> CapstanError:
    result = runner.invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, CapstanError), result.output
    return result.exception


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should hold a layout"),
        ('{"groups": [[true]]}', r"groups\.0\.0"),
        ('{"groups": [[0.5]]}', r"groups\.0\.0"),
        ('{"groups": [[0]], "more": 1}', "more: Extra inputs"),
        ('{"groups": [[0, 1, 2, 3], [4, 5, 6, 6]]}', "device 6 comes twice"),
        ('{"groups": [[0, 1], [2, 3]]}', "holds 4 devices, the cluster has 8"),
        ('{"groups": [[0, 1, 2, 3], [4, 5, 6, 8]]}', "no device 8; the cluster has 0 to 7"),
        ('{"groups": [[0, 1, 2, 3], [4, 5, 6, "region9-9"]]}', "no device 'region9-9'"),
        ('{"groups": [[0, 1, 2], [3, 4, 5, 6, 7]]}', "hold 3 to 5"),
        ('{"groups": []}', "at least one group"),
        ("[" * 100_000, "Invalid JSON: recursion limit"),
    ],
)
def test_a_layout_file_that_is_none_is_named(text: str, message: str, net: Path, tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(text)
    error = failure(net, "--evaluate", path)
    assert error.exit_code == 1
    assert str(path) in str(error)
    assert re.search(message, str(error))


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        ([], 2, "either a cluster file or a --scenario"),
        (["net.yaml", "--scenario", "spot"], 2, "either a cluster file or a --scenario"),
        (["--scenario", "moon"], 2, "no scenario 'moon'"),
        (["none.yaml"], 1, "cannot be read"),
        (["--scenario", "spot", "--stages", 128], 2, "64 devices cannot hold 128 stages"),
        (["--scenario", "spot", "--parameters", "nan"], 2, "parameters is nan"),
        (["--scenario", "spot", "--cost-model", "paper", "--hidden-size", 1024], 2, "constants for"),
        (["--scenario", "spot", "--evaluate", "none.json"], 1, "cannot be read"),
        (["--scenario", "spot", "--search", "exhaustive"], 2, "goes through 50,000 at most"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(words: list[object], exit_code: int, message: str) -> None:
    error = failure(*words)
    assert error.exit_code == exit_code
    assert message in str(error)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("latency_s", "[[null, -0.1], [0.1, null]]", "latency of a -> b is -0.1"),
        ("latency_s", "[[null, .nan], [0.1, null]]", "latency of a -> b is nan"),
        ("latency_s", "[[null, null], [0.1, null]]", "lacks row 0, column 1"),
        ("bandwidth_bytes_per_s", "[[null, 0], [1e8, null]]", "bandwidth of a -> b is 0"),
    ],
)
def test_entries_that_no_network_has_are_errors(field: str, value: str, message: str, tmp_path: Path) -> None:
    good = {"latency_s": "[[null, 0.1], [0.1, null]]", "bandwidth_bytes_per_s": "[[null, 1e8], [1e8, null]]"}
    path = tmp_path / "net.yaml"
    lines = [f"{key}: {text}" for key, text in (good | {field: value}).items()]
    path.write_text("\n".join(["format: capstan.cluster", "version: 1", "machines: [a, b]", *lines]))
    error = failure(path, "--stages", 2)
    assert error.exit_code == 1
    assert message in str(error)


def test_asymmetric_links_are_an_error_unless_their_mean_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "net.csv"
    path.write_text("source,target,latency_s,bandwidth_bytes_per_s\na,b,0.1,1e8\nb,a,0.2,1e8\n")
    error = failure(path, "--stages", 2)
    assert error.exit_code == 2
    assert "a -> b has 0.1 s" in str(error)
    # 2 stages of one device: there and back, 4.096 GB each way.
    told = record(path, "--stages", 2, "--asymmetric", "mean")
    assert told["cost_s"] == pytest.approx(0.1 + 0.2 + 2 * 40.96, rel=1e-12)


def test_a_layout_and_stages_that_differ_are_refused(net: Path, tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text('{"groups": [[0, 2, 4, 6], [1, 3, 5, 7]]}')
    assert "has 2 stages, but --stages asks for 4" in str(failure(net, "--evaluate", path, "--stages", 4))


def test_a_simulated_step_tells_how_it_runs_and_a_layout_of_it_is_simulated_again(
    net: Path, tmp_path: Path
) -> None:
    told = record(
        "--cluster", net, "--schedule", "auto", "--activation-bits", "4,16", "--batch-tokens", 65536
    )
    assert told.keys() == {
        "verb", "scenario", "cluster", "layout", "step_s", "layers", "schedule", "micro_batches", "bits",
        "search_s", "seed", "plan",
    }  # fmt: skip
    assert told["cluster"] == str(net)
    assert sum(told["layers"]) == 24
    assert told["step_s"] == pytest.approx(told["plan"]["seconds"], rel=1e-12)
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(told["layout"]))
    again = record(
        net, "--evaluate", path, "--schedule", told["schedule"], "--micro-batches", told["micro_batches"],
        "--activation-bits", told["bits"]["activations"], "--batch-tokens", 65536,
    )  # fmt: skip
    assert again["step_s"] == told["step_s"]


def test_chart_rank_map_and_commands_are_written(net: Path, tmp_path: Path) -> None:
    chart, ranks = tmp_path / "step.svg", tmp_path / "ranks.json"
    text = run(net, "--stages", 2, "--gantt", chart, "--rank-map", ranks, "--micro-batches", 4)
    assert chart.read_text().startswith("<svg ")
    written = json.loads(ranks.read_text())
    assert (written["format"], written["version"], written["run"]["micro_batches"]) == (
        "capstan.rank-map",
        1,
        4,
    )
    for each in written["ranks"]:
        assert f"{each['host']}: torchrun --nnodes=8 --nproc-per-node=1 --node-rank={each['rank']} " in text
    # The paper's cost has a map, too, which says nothing of a step.
    told = record(net, "--stages", 2, "--rank-map", ranks)
    assert len(told["torchrun"]) == 8
    assert json.loads(ranks.read_text())["run"] is None


def test_devices_that_change_are_planned_for(net: Path) -> None:
    words = [net, "--stages", 2, "--schedule", "1f1b", "--micro-batches", 4]
    text = run(*words, "--without", "region1-2")
    assert "before the change" in text
    assert "0 moves, 0 B of weights" in text
    assert "region1-2" not in text
    change = record(*words, "--slow", "region1-2=8", "--without", "region0-1")["change"]
    assert change.keys() == {"before_s", "unchanged_s", "after_s", "moves", "moved_bytes"}
    assert change["before_s"] < change["after_s"] <= change["unchanged_s"] * 1.05


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (["--schedule", "2f2b"], 2, "no schedule '2f2b'. Known: 1f1b, auto, gpipe."),
        (["--activation-bits", "many"], 2, "--activation-bits is 'many'"),
        (["--activation-bits", ""], 2, "--activation-bits is ''"),
        (["--gradient-bits", "9"], 2, "no 9 bits"),
        (["--micro-batches", 0], 2, "at least 1 micro-batch"),
        (["--layers", 0], 2, "num_layers is 0"),
        (["--sequence", -1], 2, "sequence_tokens is -1"),
        (["--device-flops", 0], 2, "computes 0.0 flops/s"),
        (["--nic-gbit", 0], 2, "up_bytes_per_s has 0.0"),
        (["--nic-gbit", "nan"], 2, "up_bytes_per_s has nan"),
        (["--slow", "region0-0"], 2, "give DEVICE=FACTOR"),
        (["--slow", "region0-0=fast"], 2, "give DEVICE=FACTOR"),
        (["--slow", "region0-0=2", "--slow", "region0-0=3"], 2, "twice"),
        (["--slow", "moon=2"], 2, "no device 'moon'"),
        (["--without", "moon"], 2, "no device 'moon'"),
        (["--schedule", "auto", "--svg", "map.svg"], 2, "belong to the paper's cost"),
        (["--schedule", "auto", "--cost-model", "paper"], 2, "belong to the paper's cost"),
        (["--schedule", "auto", "--cluster", "other.yaml"], 2, "Name the cluster file once"),
        (["--schedule", "auto", "--parameters", "inf"], 2, "parameters is inf"),
        (["--schedule", "auto", "--stages", 16], 2, "fewer devices than stages"),
    ],
)
def test_a_simulated_step_that_cannot_be_says_what_to_do(
    words: list[object], exit_code: int, message: str, net: Path
) -> None:
    error = failure(net, *words)
    assert error.exit_code == exit_code
    assert message in str(error)


def test_asymmetric_links_are_simulated_each_way_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "net.csv"
    path.write_text("source,target,latency_s,bandwidth_bytes_per_s\na,b,0.1,1e8\nb,a,0.2,1e8\n")
    words = [path, "--stages", 2, "--schedule", "gpipe", "--micro-batches", 1]
    assert failure(*words).exit_code == 2
    told = record(*words, "--asymmetric", "mean")
    # Forward and backward of 12 layers on each, there and back, 4.096 GB each way.
    compute_s = 6 * 1.3e9 * 1e6 / 5e13
    assert told["step_s"] == pytest.approx(compute_s + 0.1 + 0.2 + 2 * 40.96, rel=1e-12)
