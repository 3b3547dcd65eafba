"""Servers as programs of their own: ours, and transformers' own."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

_STARTING_S = 120.0


class Program:
    """A server that answers, and its process."""

    def __init__(self, url: str, process: "subprocess.Popen[Any]") -> None:
        self.url, self._process = url, process

    @property
    def rss_bytes(self) -> int:
        """Memory of the process and those that it started."""
        one = psutil.Process(self._process.pid)
        return sum(each.memory_info().rss for each in [one, *one.children(recursive=True)])


@contextmanager
def served(folder: Path, *words: str, longest: int = 512) -> Iterator[Program]:
    """`capstan serve` over a model."""
    command = [sys.executable, "-m", "capstan", "serve", str(folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--max-length", str(longest), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"is served at (\S+)", said)):
            line = process.stderr.readline()
            if not line:
                raise SystemExit(f"the server has ended: {said}")
            said += line
        yield Program(found[1], process)
    finally:
        _end(process)


@contextmanager
def served_by_transformers(folder: Path, python: Path, log: Path, *words: str) -> Iterator[Program]:
    """`transformers serve` over a model, from its own environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(python.with_name("transformers")), "serve", str(folder), "--device", "cpu"]
    with log.open("w") as said:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *words], stdout=said, stderr=said
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + _STARTING_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"transformers serve does not answer: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield Program(url, process)
    finally:
        _end(process)


def _answers(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/health", timeout=2.0).status_code == 200)
    except httpx.HTTPError:
        return False


def _end(process: "subprocess.Popen[Any]") -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
