"""`capstan generate` as a user runs it: a process of its own, files in, files out."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from capstan.cli import main
from world import Forked

BUDGETS = ["--device", "cpu", "--device-memory", "3MiB", "--host-memory", "1MiB"]
EVERYWHERE = "weights=device:0.4,host:0.3,disk:0.3 cache=host attention=host activations=device"


@pytest.fixture
def start(environment: Mapping[str, str]) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`start("generate", …)`: the installed command as a process."""
    processes: list[subprocess.Popen[str]] = []

    def start(*words: str) -> "subprocess.Popen[str]":
        command = [str(Path(sys.executable).with_name("capstan")), *words]
        process = subprocess.Popen(
            command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def in_process(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`in_process("generate", …)`: the same without a process of its own; returns the exit code."""
    monkeypatch.setenv("CAPSTAN_CACHE", environment["CAPSTAN_CACHE"])
    return lambda *words: main(list(words))


def greedy(model: Path, prompts: list[str], num_new: list[int]) -> list[str]:
    """The likeliest continuations by transformers, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = []
    for prompt, count in zip(prompts, num_new, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = network.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4, "take another prompt: this one is a near tie"
        texts.append(tokenizer.decode(output.sequences[0, tokens.shape[1] :]))
    return texts


def check_kept_promises(record: dict[str, Any]) -> None:
    """What was measured is what was planned: every byte on every link, and no more memory."""
    plan, trace = record["plan"], record["trace"]
    assert {phase["name"]: phase["bytes"] for phase in plan["phases"]} == {
        phase["name"]: phase["bytes"] for phase in trace["phases"]
    }
    for tier, peak_bytes in trace["peak_bytes"].items():
        assert peak_bytes <= plan["peak_bytes"].get(tier, 0), tier
    for tier, peak_bytes in plan["peak_bytes"].items():
        assert peak_bytes <= plan["budget_bytes"][tier], tier


def check_answers(model: Path, requests: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    """Every request is answered once, as transformers answers it."""
    asked = {line["custom_id"]: line["body"] for line in requests}
    bodies = {line["custom_id"]: line["response"]["body"] for line in answers}
    assert len(answers) == len(asked)
    num_new = [body["max_tokens"] for body in asked.values()]
    expected = greedy(model, [body["prompt"] for body in asked.values()], num_new)
    assert [bodies[name]["choices"][0]["text"] for name in asked] == expected
    assert [bodies[name]["usage"]["completion_tokens"] for name in asked] == num_new


def test_a_job_over_all_tiers_moves_the_bytes_that_were_planned(
    start: Callable[..., "subprocess.Popen[str]"],
    model: Path,
    write_requests: Callable[..., None],
    read_lines: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 7, lambda index: 3 + index)
    words = ["--model", str(model), "--input", str(requests), "--output", str(output), *BUDGETS]
    process = start("generate", *words, "--place", EVERYWHERE, "--json")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "generation on" in stderr, "the plan goes to standard error"

    record = json.loads(stdout)
    assert record["verb"] == "generate"
    assert (record["num_answered"], record["num_errors"], record["num_answered_before"]) == (7, 0, 0)
    moved = record["trace"]["bytes"]
    assert set(moved) == {"disk->host", "host->device", "device->host"}
    assert moved["disk->host"]["weights"] > 0
    assert moved["host->device"]["weights"] > moved["disk->host"]["weights"]
    assert moved["device->host"]["cache"] > 0
    check_kept_promises(record)
    check_answers(model, read_lines(requests), read_lines(output))


def test_a_job_without_a_placement_is_planned_within_its_budgets(
    in_process: Callable[..., int],
    model: Path,
    write_requests: Callable[..., None],
    read_lines: Callable[[Path], list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 9, lambda index: 12 - index)
    words = ["--model", str(model), "--input", str(requests), "--output", str(output), "--device", "cpu"]
    words += ["--device-memory", "800KiB", "--host-memory", "300KiB", "--json"]
    assert in_process("generate", *words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["trace"]["bytes"]["disk->host"]["weights"] > 0, "all weights fit: the budget is too large"
    check_kept_promises(record)
    check_answers(model, read_lines(requests), read_lines(output))


def test_after_ctrl_c_the_same_command_goes_on(
    fork: Callable[..., Forked],
    environment: Mapping[str, str],
    in_process: Callable[..., int],
    model: Path,
    write_requests: Callable[..., None],
    read_lines: Callable[[Path], list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 24, lambda index: 40 + 3 * index)
    words = ["--model", str(model), "--input", str(requests), "--output", str(output), *BUDGETS]
    words += ["--place", EVERYWHERE]
    process = fork("commands.py", "capstan", "generate", *words, environment=environment)
    deadline_s = time.monotonic() + 120
    while not (output.exists() and output.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Stopped. The same command goes on where it was." in stderr
    assert "Traceback" not in stderr
    answered = {line["custom_id"] for line in read_lines(output)}
    assert 0 < len(answered) < 24

    assert in_process("generate", *words) == 0
    captured = capsys.readouterr()
    assert "requests are answered already; going on with the rest." in captured.err
    assert f"{24 - len(answered)} answered, {len(answered)} had been done before." in captured.out
    assert sorted(line["custom_id"] for line in read_lines(output)) == sorted(
        f"request-{index}" for index in range(24)
    )


def test_an_answer_that_was_half_written_is_given_again(
    in_process: Callable[..., int],
    model: Path,
    write_requests: Callable[..., None],
    read_lines: Callable[[Path], list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 6, lambda index: 2 + index)
    words = ["--model", str(model), "--input", str(requests), "--output", str(output), *BUDGETS]
    assert in_process("generate", *words) == 0
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    # As a kill in the middle of a write leaves it: three lines, and a part of the fourth.
    torn = b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2]
    output.write_bytes(torn)
    capsys.readouterr()

    assert in_process("generate", *words) == 0
    assert "3 requests are answered already" in capsys.readouterr().err
    assert output.read_bytes().startswith(b"".join(lines[:3]))
    assert sorted(output.read_bytes().splitlines(keepends=True)) == sorted(lines)

    finished = output.read_bytes()
    assert in_process("generate", *words, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["num_answered"], record["num_answered_before"]) == (0, 6)
    assert record["plan"] is None
    assert record["trace"] is None
    assert output.read_bytes() == finished
    assert len(read_lines(output)) == 6
