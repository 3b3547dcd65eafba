"""What every system is asked to do, and how each of them is measured, in words that all of them share.

A run is one process: it reads a `Job` as JSON from its command line, limits the device, generates, writes the
tokens to `job.tokens_file` and prints one JSON line. Nothing here needs more than numpy and torch, since a
peer may live in an environment of its own.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULT = "RESULT "  # begins the line that carries the result
FIRST_TOKEN = 3  # smaller ones are special in some vocabularies


@dataclass(frozen=True, kw_only=True)
class Job:
    """Sequences to generate, the memory that may be used, and each system's own settings."""

    model: str
    folder: str
    made_up: bool  # the weights are in no file
    sequences: int
    prompt: int
    new: int
    lengths: str  # "fixed", or "uniform:32-512"
    shared_prefix: int
    padded: bool  # every prompt is padded to the longest
    vocabulary: int
    seed: int
    dtype: str
    device: str
    device_memory: int
    host_memory: int
    disk: str  # a folder for scratch files
    tokens_file: str
    # Capstan
    weight_bits: int | None = None
    cache_bits: int | None = None
    place: tuple[str, ...] = ()
    share_prefixes: bool | None = False  # None: where the plan is faster so
    # accelerate
    peer_batches: tuple[int, ...] = ()
    peer_offload: str = "cpu"
    peer_cache: str = "dynamic"
    peer_dtype: str | None = None
    keep_file_cache: bool = False
    # FlexLLMGen
    flexllmgen_path: str = ""
    flexllmgen_policy: str = ""

    @staticmethod
    def from_json(text: str) -> "Job":
        values = json.loads(text)
        tuples = {"place", "peer_batches"}
        return Job(**{key: tuple(value) if key in tuples else value for key, value in values.items()})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def prompts_of(job: Job) -> list[list[int]]:
    """The prompts, the same for every system and every run of a seed."""
    random = np.random.default_rng(job.seed)
    lengths = _lengths(job, random)
    shared = random.integers(FIRST_TOKEN, job.vocabulary, job.shared_prefix).tolist()
    prompts = []
    for length in lengths:
        own = random.integers(FIRST_TOKEN, job.vocabulary, max(lengths)).tolist()
        prompts.append([*shared, *own][:length])
    if job.padded:
        prompts = [[FIRST_TOKEN] * (max(lengths) - len(prompt)) + prompt for prompt in prompts]
    return prompts


def _lengths(job: Job, random: np.random.Generator) -> list[int]:
    kind, _, span = job.lengths.partition(":")
    if kind == "fixed":
        return [job.prompt] * job.sequences
    shortest, _, longest = span.partition("-")
    return random.integers(int(shortest), int(longest) + 1, job.sequences).tolist()


def limit_device(job: Job) -> None:
    """Make the cap real, before anything is allocated. A processor's share of memory is not enforced here."""
    if job.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.device_memory / total))


def forget_files(folder: Path) -> None:
    """Drop the files' pages from the page cache: they must come from the disk."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident_bytes(field: str) -> int:
    """Memory of this process that is real: `VmRSS` for now, `VmHWM` for the most it ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), 0)


@dataclass
class Outcome:
    """What a system did. `tokens[i]` are the new tokens of prompt i; seconds are None where unknown."""

    tokens: list[list[int]]
    opening_s: float
    seconds: float
    prefill_s: float | None
    decode_s: float | None
    details: dict[str, Any]


def run(generate: Callable[[Job], Outcome], *packages: str) -> None:
    """The main function of a run: `generate` does the job, everything around it is the same for all."""
    job = Job.from_json(sys.argv[1])
    limit_device(job)
    forget_files(Path(job.folder))
    resident_before = resident_bytes("VmRSS")
    outcome = generate(job)
    tokens = np.array(outcome.tokens, dtype=np.int64)
    assert tokens.shape == (job.sequences, job.new), f"the run is not whole: {tokens.shape}"
    np.save(job.tokens_file, tokens)
    num_tokens = job.sequences * job.new
    result = {each.name: getattr(outcome, each.name) for each in fields(Outcome) if each.name != "tokens"}
    result |= {
        "num_tokens": num_tokens,
        "tokens_per_s": num_tokens / outcome.seconds,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if job.device == "cuda" else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if job.device == "cuda" else None,
        "peak_rss_bytes": resident_bytes("VmHWM"),
        "rss_bytes_before": resident_before,
        "versions": {"python": platform.python_version(), **_versions("torch", *packages)},
    }
    print(RESULT + json.dumps(result), flush=True)


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def settled(device: str) -> float:
    """Now, in seconds, when the device has done all it was told to."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
