"""`capstan serve` as a program: kill -9 during a batch, a token, an orderly end."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from world import Forked

TOKEN = "eight bars"


class Program:
    """A server in a process of its own."""

    def __init__(self, process: Forked, url: str, token: str) -> None:
        self.process, self.url = process, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)


@contextmanager
def _program(
    fork: Callable[..., Forked], model: Path, files: Path, environment: Mapping[str, str]
) -> Iterator[Program]:
    words = ["serve", str(model), "--port", "0", "--files", str(files), "--max-length", "128", "--slots", "8"]
    words += ["--device", "cpu", "--device-memory", "16MiB", "--host-memory", "8MiB", "--json"]
    process = fork("commands.py", "capstan", *words, environment={**environment, "CAPSTAN_TOKEN": TOKEN})
    try:
        while not (found := re.search(r"is served at (\S+)\s", process.err)):
            assert process.poll() is None, f"the server has ended: {process.err}"
            time.sleep(0.01)
        yield Program(process, found[1], TOKEN)
    finally:
        process.kill()


def _ended(client: openai.OpenAI, identity: str) -> Any:
    deadline_s = time.monotonic() + 120
    while (batch := client.batches.retrieve(identity)).status not in ("completed", "failed"):
        assert time.monotonic() < deadline_s, batch.status
        time.sleep(0.05)
    return batch


def _bodies(client: openai.OpenAI, identity: str, count: int) -> dict[str, Any]:
    lines = [json.loads(line) for line in client.files.content(identity).text.splitlines()]
    bodies = {line["custom_id"]: line["response"]["body"]["choices"] for line in lines}
    assert len(bodies) == len(lines) == count
    return bodies


@pytest.mark.parametrize("num_lines", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_a_batch_goes_on_after_kill_9_and_every_line_is_answered_once(
    fork: Callable[..., Forked],
    model: Path,
    environment: Mapping[str, str],
    write_requests: Callable[..., None],
    tmp_path: Path,
    num_lines: int,
) -> None:
    requests, files = tmp_path / "requests.jsonl", tmp_path / "files"
    write_requests(requests, num_lines, lambda index: 20 + (11 * index) % 41)
    with _program(fork, model, files, environment) as program:
        client = program.client
        uploaded = client.files.create(file=requests, purpose="batch").id
        batch = client.batches.create(
            input_file_id=uploaded, endpoint="/v1/completions", completion_window="24h"
        )
        while client.batches.retrieve(batch.id).request_counts.completed < num_lines // 10:
            time.sleep(0.01)
        program.process.send_signal(signal.SIGKILL)
        assert program.process.wait(timeout=60) == -signal.SIGKILL
    (journal,) = (files / "batches").glob("*.jsonl")
    written = journal.read_bytes()
    before = written[: written.rfind(b"\n") + 1].splitlines()  # the last line may be torn
    assert num_lines // 10 <= len(before) < num_lines

    with _program(fork, model, files, environment) as program:
        client = program.client
        done = _ended(client, batch.id)
        assert done.status == "completed"
        assert done.request_counts.completed == num_lines
        assert client.files.content(done.output_file_id).read().splitlines()[: len(before)] == before
        again = client.batches.create(
            input_file_id=uploaded, endpoint="/v1/completions", completion_window="24h"
        )
        undisturbed = _ended(client, again.id)
        assert _bodies(client, done.output_file_id, num_lines) == _bodies(
            client, undisturbed.output_file_id, num_lines
        )

        try:
            openai.OpenAI(base_url=f"{program.url}/v1", api_key="wrong", max_retries=0).models.list()
        except openai.AuthenticationError as error:
            assert error.status_code == 401
        else:
            raise AssertionError("the token from the environment is not asked for")

        program.process.send_signal(signal.SIGTERM)
        out, _ = program.process.communicate(timeout=60)
        assert program.process.returncode == 0
        record = json.loads(out)
        assert record["verb"] == "serve"
        assert record["num_finished"] == 2 * num_lines - len(before)
        assert record["trace"]["peak_bytes"]["device"] <= record["plan"]["peak_bytes"]["device"]
