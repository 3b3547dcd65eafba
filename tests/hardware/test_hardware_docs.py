import re
from pathlib import Path

import pytest

from capstan.hardware import Cluster, Machine, scenario
from capstan.hardware.regions import SCENARIOS

PAGE = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")


def test_the_example_of_a_cluster_is_a_cluster(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    path = tmp_path / "net.yaml"
    path.write_text(example, encoding="utf-8")
    cluster = Cluster.from_yaml(path)
    assert cluster.names == ("lab", "cloud", "home")
    assert cluster.link("home", "lab").bandwidth_bytes_per_s == 1.2e7
    assert cluster.devices["lab"].kind == "cuda"


def test_the_latency_in_the_example_is_the_built_in_one() -> None:
    assert scenario("worldwide").link("Oregon-0", "Tokyo-24").latency_s == pytest.approx(0.096)
    assert '.link("Oregon-0", "Tokyo-24").latency_s  # 0.096' in PAGE


def test_every_field_of_the_json_is_described(machine: Machine) -> None:
    record = machine.as_dict()
    for name in {*record, *record["devices"][0], *record["links"][0]}:
        assert f"`{name}" in PAGE, name


def test_every_scenario_is_named() -> None:
    assert all(f"`{name}`" in PAGE for name in SCENARIOS)
