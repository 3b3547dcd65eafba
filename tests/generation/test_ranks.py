"""A model divided over ranks answers as one that is not, and every byte between ranks was predicted.

Starting a rank takes seconds, so each world of ranks is started once and runs many cases.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from capstan.generation import Request
from capstan.hardware import Machine

AMPLE = {"device": 100 << 20, "host": 100 << 20, "disk": 100 << 20}
NEAR = "weights=device cache=device"
STREAMED = "weights=device:0.3,host:0.4,disk:0.3 cache=host attention=host"
FAR = "weights=disk cache=disk attention=device activations=disk"
HALF = "weights=host cache=device activations=host"
# As in test_scores.py: sums of the same terms in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """`start_ranks(size, arguments)`: processes with torchrun's variables, one for each rank."""
    started: list[subprocess.Popen[str]] = []

    def start_ranks(size: int, arguments: Sequence[str], **variables: str) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = os.environ | {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
            **variables,
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        started.extend(ranks)
        return ranks

    yield start_ranks
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def run_world(
    start_ranks: Callable[..., list[Any]], machine: Machine, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[list[dict[str, Any]]]]:
    """`run_world(size, cases)`: for each case, what each rank reports."""

    def run_world(size: int, cases: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("world")
        world = {"machine": machine.as_dict(), "scratch": str(folder), "cases": cases}
        (folder / "world.json").write_text(json.dumps(world))
        script = Path(__file__).with_name("ranks_world.py")
        ranks = start_ranks(size, [str(script), str(folder / "world.json")])
        outputs = [process.communicate(timeout=200) for process in ranks]
        for process, (_, errors) in zip(ranks, outputs, strict=True):
            assert process.returncode == 0, errors
        return [list(reports) for reports in zip(*(json.loads(out) for out, _ in outputs), strict=True)]

    return run_world


def _case(folder: Path, requests: Sequence[Request], place: str, shape: tuple[int, int], size: int) -> Any:
    asked = [{"prompt": list(each.prompt), "max_tokens": each.max_tokens} for each in requests]
    return {
        "folder": str(folder),
        "place": place,
        "shape": shape,
        "budgets": [AMPLE] * size,
        "requests": asked,
    }


def _check_promises(report: Mapping[str, Any]) -> None:
    assert report["counted"] == report["planned"]
    for tier, peak_bytes in report["peak"].items():
        assert peak_bytes <= report["planned peak"].get(tier, 0), tier


FEW = [("llama", NEAR, (2, 3)), ("llama", STREAMED, (1, 2)), ("opt", FAR, (2, 3)), ("gemma2", HALF, (1, 3))]


def test_two_ranks(run_world: Any, model_folder: Any, expected: Any, requests: list[Request]) -> None:
    cases = [_case(model_folder(name), requests, place, shape, 2) for name, place, shape in FEW]
    for (name, *_), reports in zip(FEW, run_world(2, cases), strict=True):
        for report in reports:
            assert "error" not in report, report
            assert [each["tokens"][0] for each in report["answers"]] == expected(name)
            _check_promises(report)
