"""kill -9 at any moment: the same command goes on, and every request is answered once."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_job_that_is_killed_again_and_again_answers_every_request_once(
    model: Path,
    environment: Mapping[str, str],
    write_requests: Callable[..., None],
    read_lines: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    kills: int,
) -> None:
    requests, folder = tmp_path / "requests.jsonl", tmp_path / "out"
    folder.mkdir()
    write_requests(requests, 60, lambda index: 20 + (11 * index) % 41)
    place = "weights=device:0.4,host:0.3,disk:0.3 cache=host attention=host activations=device"
    command = ["generate", "--model", str(model), "--input", str(requests), "--device", "cpu"]
    command += ["--device-memory", "3MiB", "--host-memory", "1MiB", "--place", place]
    driver = [sys.executable, str(Path(__file__).with_name("kill_driver.py")), "7", str(kills), str(folder)]
    done = subprocess.run(
        [*driver, *command], env=dict(environment), capture_output=True, text=True, check=False
    )
    log = (folder / "log").read_text() if (folder / "log").exists() else ""
    assert done.returncode == 0, done.stderr + log
    report = json.loads(done.stdout)

    assert report["codes"].count(-signal.SIGKILL) == kills
    assert set(report["codes"]) <= {-signal.SIGKILL, 0}, log
    assert report["codes"][-1] == 0
    whole = {line["custom_id"]: line for line in read_lines(Path(report["whole"]))}
    assert set(whole) == {f"request-{index}" for index in range(60)}
    for output in map(Path, report["killed"]):
        lines = read_lines(output)
        assert len(lines) == len(whole)
        assert {line["custom_id"]: line for line in lines} == whole
