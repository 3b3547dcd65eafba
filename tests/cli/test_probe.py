import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from capstan.cli.probe import probe
from capstan.errors import DeviceError
from capstan.hardware import Machine

app = typer.Typer()
app.command("probe")(probe)
runner = CliRunner()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, *words: str) -> tuple[str, str]:
    """Standard output and standard error of a run that succeeds."""
    result = runner.invoke(
        app, ["--device", "cpu", *words], env={"CAPSTAN_CACHE": str(cache), "COLUMNS": "140"}
    )
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_json_is_one_object_and_the_only_thing_on_standard_output(cache: Path) -> None:
    output, errors = run(cache, "--seconds", "0.5", "--json")
    record = json.loads(output)
    assert record["verb"] == "probe"
    machine = Machine.from_dict(record["machine"])
    assert Machine.from_json(Path(record["profile"]).read_text()) == machine
    assert errors == ""


def test_the_kept_profile_is_shown_when_asked_for(cache: Path) -> None:
    run(cache, "--seconds", "0.5")
    output, errors = run(cache, "--cached")
    assert "Read from the profile" in errors
    assert "Read from the profile" not in output


def test_the_table_shows_rates_memory_links_and_notes(cache: Path) -> None:
    output, _ = run(cache, "--seconds", "0.5")
    for text in ("host -> device", "disk -> host", "GB/s", "FLOP/s", "GiB", "both ways at once", "Kept in"):
        assert text in output
    assert "host memory plays the device" in " ".join(output.split())


def test_a_folder_that_is_not_there_is_an_error(cache: Path) -> None:
    result = runner.invoke(
        app,
        ["--device", "cpu", "--disk", str(cache / "none"), "--seconds", "0.5"],
        env={"CAPSTAN_CACHE": str(cache)},
    )
    assert isinstance(result.exception, DeviceError)
    assert result.stdout == ""


def test_help_teaches_each_option() -> None:
    output = runner.invoke(app, ["--help"], env={"COLUMNS": "140"}).output
    for option in ("--device", "--disk", "--seconds", "--cached", "--json"):
        assert option in output
