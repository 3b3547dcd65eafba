"""Runs one batch job again and again and kills it, from a process in which everything is imported.

Arguments: seed, kills wanted, folder for outputs, then the words of the command, without --output.
Prints one JSON object: the outputs, one of a job that nobody disturbed, and every exit code.
A process of its own, because a fork is safe only while no other thread runs.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import capstan.generation.batch.job  # noqa: E402, F401
from capstan.cli import main  # noqa: E402


def start(words: list[str], output: Path) -> int:
    """Fork a process that runs the command; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with (output.parent / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = main([*words, "--output", str(output)])
            sys.stdout.flush()
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    """The exit code of a process that is over, negative for a signal; None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def size_of(output: Path) -> int:
    return output.stat().st_size if output.exists() else 0


def lines_of(output: Path) -> list[bytes]:
    """The whole lines."""
    return output.read_bytes().split(b"\n")[:-1] if output.exists() else []


def attempt(words: list[str], output: Path, *, wait_for_write: bool, delay_s: float) -> int:
    """Run until killed after `delay_s`, from the start or from the first write, or until it ends."""
    before = size_of(output)
    child = start(words, output)
    from_s = None if wait_for_write else time.monotonic()
    while (code := ended(child)) is None:
        now_s = time.monotonic()
        if from_s is None and size_of(output) > before:
            from_s = now_s
        if from_s is not None and now_s - from_s >= delay_s:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.0005)
    return code


def drive(seed: int, wanted: int, folder: Path, words: list[str]) -> dict[str, object]:
    chance = random.Random(seed)
    whole = folder / "whole.jsonl"
    start_s = time.monotonic()
    child, first_s = start(words, whole), 0.0
    while (code := ended(child)) is None:
        if not first_s and size_of(whole):
            first_s = time.monotonic() - start_s
        time.sleep(0.0005)
    all_s = time.monotonic() - start_s
    codes = [code]
    outputs: list[Path] = []
    # A job that ends before it was killed often enough is followed by another one.
    while codes.count(-signal.SIGKILL) < wanted:
        outputs.append(folder / f"killed-{len(outputs)}.jsonl")
        while codes.count(-signal.SIGKILL) < wanted:
            # While it loads, plans and prefills; then while it sweeps and writes.
            wait_for_write = bool(len(codes) % 2)
            delay_s = chance.uniform(0.0, (all_s - first_s) / 6 if wait_for_write else 1.1 * first_s)
            before = lines_of(outputs[-1])
            codes.append(attempt(words, outputs[-1], wait_for_write=wait_for_write, delay_s=delay_s))
            assert lines_of(outputs[-1])[: len(before)] == before, "a written answer was changed"
            if codes[-1] != -signal.SIGKILL:
                break
    codes.append(attempt(words, outputs[-1], wait_for_write=False, delay_s=600.0))
    return {"whole": str(whole), "killed": [str(output) for output in outputs], "codes": codes}


if __name__ == "__main__":
    print(json.dumps(drive(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
