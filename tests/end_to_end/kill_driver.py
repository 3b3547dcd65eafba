"""Runs one batch job again and again and kills it, from a process in which everything is imported.

Arguments: seed, kills wanted, folder for outputs, then the words of the command, without --output.
Prints one JSON object: for each attempt how far it came, and for each output whether it is finished.
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

import capstan.generation.batch_job  # noqa: E402, F401
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
    child = start(words, whole)
    first_s = None
    while (code := ended(child)) is None:
        if first_s is None and size_of(whole):
            first_s = time.monotonic() - start_s
        time.sleep(0.0005)
    all_s = time.monotonic() - start_s
    assert code == 0, (folder / "log").read_text()
    assert first_s is not None
    codes: list[int] = []
    outputs: list[str] = []
    sizes: list[int] = []
    # A job that ends before it was killed often enough is followed by another one.
    while codes.count(-signal.SIGKILL) < wanted:
        output = folder / f"killed-{len(outputs)}.jsonl"
        outputs.append(str(output))
        while codes.count(-signal.SIGKILL) < wanted:
            wait_for_write = bool(len(codes) % 2)
            # While it loads, plans and prefills; then while it sweeps and writes.
            longest_s = (all_s - first_s) / 6 if wait_for_write else 1.1 * first_s
            codes.append(
                attempt(
                    words, output, wait_for_write=wait_for_write, delay_s=chance.uniform(0.0, longest_s)
                )
            )
            sizes.append(size_of(output))
            if codes[-1] == 0:
                break
    last = Path(outputs[-1])
    final = ended_code = attempt(words, last, wait_for_write=False, delay_s=600.0)
    assert ended_code == 0, (folder / "log").read_text()
    return {
        "whole": str(whole),
        "outputs": outputs,
        "codes": codes,
        "sizes": sizes,
        "final": final,
        "seconds": [first_s, all_s],
    }


if __name__ == "__main__":
    print(json.dumps(drive(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
