"""What tests of several rooms share: worlds of ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORLD = Path(__file__).with_name("world.py")


@pytest.fixture(scope="session")
def in_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`in_world(file, function, size, arguments)`: what the function returned on every rank; see world.py."""

    def run(file: str, function: str, size: int, arguments: Any = None, *, failing: int = 0) -> list[Any]:
        folder = tmp_path_factory.mktemp(f"world-{size}")
        command = [sys.executable, str(WORLD), file, function, str(size), str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(
            [*command, json.dumps(arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
            check=False,
        )
        assert done.returncode == failing, done.stderr
        saved = [folder / f"{rank}.pt" for rank in range(size)]
        return [torch.load(path, weights_only=True) if path.exists() else None for path in saved]

    return run
