"""The page about this room: its examples run, its figures of bytes are right."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from capstan.cli.federate import federate
from capstan.federation import CutDimensions, TopK, Wire, traffic_report
from capstan.plans import Plan, Trace

PAGE = (Path(__file__).parents[2] / "docs" / "federation.md").read_text()


def test_the_example_in_python_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "docs/federation.md", "exec"), {})
    said = capsys.readouterr().out
    # Four clusters, two deviations apart in each of two directions; guessing gives 0.25.
    assert float(said.rpartition(" ")[2]) > 0.6


def test_the_example_in_yaml_runs(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "job.yaml").write_text(example)
    ran = CliRunner().invoke(federate, ["run", str(tmp_path / "job.yaml"), "--json"], catch_exceptions=False)
    report = json.loads(ran.stdout)
    assert Plan.from_dict(report["plan"]).traffic == Trace.from_dict(report["trace"]).traffic
    assert report["accuracy"][-1] > 0.6


def test_the_command_of_the_page_runs():
    (command,) = re.findall(r"```\ncapstan federate (traffic.*?)```", PAGE, re.DOTALL)
    ran = CliRunner().invoke(federate, command.replace("\\\n", " ").split(), catch_exceptions=False)
    assert "0.147% of a round" in ran.stdout
    assert "10.7% of a round" in ran.stdout
    assert "678 local batches" in ran.stdout


@pytest.mark.parametrize(("devices", "column"), [(32, 0), (64, 1)])
def test_the_table_of_bytes_is_right(devices, column):
    def report(bottom):
        dimensions = CutDimensions(
            cut_width=8192,
            batch=32,
            num_devices=devices,
            num_parameters=10_600_000,
            num_bottom_parameters=bottom,
        )
        return traffic_report(dimensions, Wire(sparsifier=TopK(keep=0.1), index="rice"), 0.1)

    plain, averaged = report(0), report(544)
    published = plain["published"]
    cells = [
        f"{published['fedavg_bytes'] / 1e9:.2f} GB",
        f"{published['split_bytes'] / 2**20:.0f} MiB",
        f"{published['sparse_bytes'] / 2**20:.1f} MiB",
    ]
    for told in (plain, averaged):
        sent = (told["bytes_up"] + told["bytes_down"]) / 2**20
        cells.append(f"{sent:.1f} MiB, {told['per_iteration_vs_fedavg']:.3%}".replace("%", " %"))
    rows = re.findall(r"^\| [^|]* \| ([^|]*) \| ([^|]*) \|$", PAGE, re.MULTILINE)
    found = [row[column] for row in rows if re.match(r"[\d.]+ [GM]", row[0])]
    assert found == cells


def test_every_setting_of_the_page_is_there():
    from capstan.federation import ALGORITHMS
    from capstan.federation.index_codes import INDEX_CODES

    for name in (*ALGORITHMS, *INDEX_CODES):
        assert f"| `{name}`" in PAGE
