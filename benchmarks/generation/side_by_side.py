"""Several runs of one workload, one after the other, each in a process of its own: options, table, record."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, MadeUpCheckpoint, config_of, random_checkpoint, write_checkpoint
from workload import RESULT, Job

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.hardware import Machine
from capstan.plans import bytes_text, parse_bytes, seconds_text
from record import RECORDS, write_record

HERE = Path(__file__).parent
_PROBE = "from capstan.hardware import this_machine; print(this_machine(budget_s=15).to_json())"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One system, under a name of its own, with the job that it gets."""

    label: str
    system: str
    job: Job
    python: str = sys.executable
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run printed, or why there is nothing; and its tokens, `[sequence, new]`."""

    label: str
    figures: dict[str, Any]
    tokens: np.ndarray | None = None
    failure: str = ""


# --- options --------------------------------------------------------------------------------------------


def add_workload(parser: argparse.ArgumentParser) -> None:
    """What is generated, and in how much memory."""
    add = parser.add_argument
    add("--model", choices=SHAPES, default="llama-160m")
    add("--sequences", type=int, default=64)
    add("--prompt", type=int, default=512, help="tokens of a prompt, where all have the same length")
    add("--new", type=int, default=32, help="tokens to generate for each")
    add("--seed", type=int, default=1, help="of the prompts")
    add("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--device-memory", default="16GiB", help="a size, or a share of the weights such as 25%%")
    add("--host-memory", default="110GiB", help="likewise")
    add("--weights", choices=["made-up", "written"], default=None, help="in no file, or in a checkpoint")
    add("--work", type=Path, default=Path("/tmp/capstan-benchmarks"), help="for checkpoints, scratch, tokens")
    add("--weight-bits", type=int, default=None)
    add("--cache-bits", type=int, default=None)
    add("--place", action="append", default=[])
    add("--share-prefixes", action="store_true", help="compute and keep a shared prefix once")
    add("--record", default=None, help="name of the record to write")
    add("--folder-of-records", type=Path, default=RECORDS)


def job_from(options: argparse.Namespace, *, written: bool, **more: Any) -> Job:
    """The job that the options describe, its model folder made."""
    config = config_of(options.model, options.dtype)
    name = f"{options.model}-{options.dtype}"
    written = written if options.weights is None else options.weights == "written"
    folder: Path = options.work / (name if written else f"{name}-made-up")
    size_bytes = MadeUpCheckpoint(folder, config).size_bytes
    (write_checkpoint if written else random_checkpoint)(folder, config)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    disk = options.work / "scratch"
    disk.mkdir(parents=True, exist_ok=True)
    values = {
        "model": options.model,
        "folder": str(folder),
        "made_up": not written,
        "sequences": options.sequences,
        "prompt": options.prompt,
        "new": options.new,
        "lengths": "fixed",
        "shared_prefix": 0,
        "padded": False,
        "vocabulary": config.vocab_size,
        "seed": options.seed,
        "dtype": options.dtype,
        "device": device,
        "device_memory": _size(options.device_memory, size_bytes),
        "host_memory": _size(options.host_memory, size_bytes),
        "disk": str(disk),
        "tokens_file": "",
        "weight_bits": options.weight_bits,
        "cache_bits": options.cache_bits,
        "place": tuple(options.place),
        "share_prefixes": options.share_prefixes,
    }
    job = Job(**(values | more))
    print(
        f"{options.model}: {bytes_text(size_bytes)} of weights, {'written' if written else 'made up'}; "
        f"{bytes_text(job.device_memory)} of the {device}, {bytes_text(job.host_memory)} of the host"
    )
    return job


def _size(text: str, weights_bytes: int) -> int:
    if text.endswith("%"):
        return int(float(text[:-1]) / 100 * weights_bytes)
    return parse_bytes(text)


# --- running --------------------------------------------------------------------------------------------


def machine() -> Machine:
    """This machine's rates, probed in a process of its own: ours must hold nothing of the device."""
    probed = subprocess.run([sys.executable, "-c", _PROBE], stdout=subprocess.PIPE, text=True, check=True)
    return Machine.from_json(probed.stdout)


def run_all(runs: list[Run], work: Path) -> list[Result]:
    """Run them in this order."""
    return [_run(each, work / f"tokens-{index}.npy") for index, each in enumerate(runs)]


def _run(run: Run, tokens_file: Path) -> Result:
    print(f"\n=== {run.label}", flush=True)
    tokens_file.unlink(missing_ok=True)
    job = Job(**{**vars(run.job), "tokens_file": str(tokens_file)})
    command = [run.python, str(HERE / f"run_{run.system}.py"), job.to_json()]
    paths = [path for path in (run.path, os.environ.get("PYTHONPATH", "")) if path]
    environment = os.environ | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})
    figures: dict[str, Any] = {}
    last = ""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(RESULT):
                figures = json.loads(line.removeprefix(RESULT))
            else:
                print(line, end="", flush=True)
                last = line.strip() or last
    if not figures:
        failure = f"killed by signal {-process.returncode}" if process.returncode < 0 else last
        return Result(label=run.label, figures={}, failure=failure)
    return Result(label=run.label, figures=figures, tokens=np.load(tokens_file))


# --- reporting ------------------------------------------------------------------------------------------


def equal_sequences(ours: Result, other: Result) -> int | None:
    """How many sequences have the same tokens in both; None where there is nothing to compare."""
    if ours.tokens is None or other.tokens is None or ours.tokens.shape != other.tokens.shape:
        return None
    if "weights" in ours.figures["details"] | other.figures["details"]:
        return None  # one of them made up weights of its own
    return int((ours.tokens == other.tokens).all(axis=1).sum())


def print_table(results: list[Result]) -> None:
    """All runs side by side. Answers are compared with the first's; host peaks leave out the imports."""
    table = Table(title="side by side")
    columns = ("tokens/s", "predicted", "opening", "prefill", "decode", "device peak", "host peak")
    table.add_column("system")
    for column in (*columns, "answers as the first's"):
        table.add_column(column, justify="right")
    for result in results:
        figures = result.figures
        if not figures:
            table.add_row(result.label, "failed")
            continue
        predicted = figures["details"].get("predicted_tokens_per_s")
        equal = equal_sequences(results[0], result)
        table.add_row(
            result.label,
            f"{figures['tokens_per_s']:,.2f}",
            f"{predicted:,.2f}" if predicted else "-",
            *(_text(figures[name], seconds_text) for name in ("opening_s", "prefill_s", "decode_s")),
            _text(figures["peak_device_bytes"], bytes_text),
            bytes_text(figures["peak_rss_bytes"] - figures["rss_bytes_before"]),
            "-" if equal is None else f"{equal} of {len(result.tokens)}",
        )
    Console(width=140).print(table)
    for result in results:
        for note in result.figures.get("details", {}).get("notes", []):
            print(f"{result.label}: {note}")
        if result.failure:
            print(f"{result.label} failed: {result.failure}")


def _text(value: float | None, form: Any) -> str:
    return "-" if value is None else form(value)


def record_results(
    name: str, *, claim: str, machine: Machine, job: Job, results: list[Result], folder: Path
) -> Path:
    """Write a record about the first result, which is ours; the others are its peers."""
    ours, others = results[0], results[1:]
    if "plan" not in ours.figures.get("details", {}):
        raise SystemExit(
            f"{ours.label} has no plan: a record is about a run of ours that ended. Put it first."
        )
    details = ours.figures["details"]
    plan, trace = details["plan"], details["trace"]
    units = {"tokens_per_s": "tokens/s", "opening_s": "s", "prefill_s": "s", "decode_s": "s"}
    figures = {key: {"value": ours.figures[key], "unit": unit} for key, unit in units.items()}
    figures["predicted_tokens_per_s"] = {"value": details["predicted_tokens_per_s"], "unit": "tokens/s"}
    for key in ("peak_device_bytes", "peak_rss_bytes", "rss_bytes_before"):
        if ours.figures[key] is not None:
            figures[key] = {"value": ours.figures[key], "unit": "bytes"}
    return write_record(
        name,
        claim=claim,
        machine=machine,
        figures=figures,
        peers={other.label: _peer(ours, other) for other in others},
        bound={"formula": "the plan's busiest resource, phase by phase", "seconds": plan["seconds"]},
        bars=_memory_bars(plan, trace) | _speed_bars(ours, others),
        folder=folder,
        workload=vars(job),
        plan=plan,
        trace=trace,
        notes=details["notes"],
    )


def _peer(ours: Result, other: Result) -> dict[str, Any]:
    if not other.figures:
        return {"failed": other.failure}
    return other.figures | {"answers_equal_to_ours": equal_sequences(ours, other)}


def _memory_bars(plan: dict[str, Any], trace: dict[str, Any]) -> dict[str, Any]:
    return {
        f"memory of the {place} within the plan": {
            "goal": goal,
            "reached": trace["peak_bytes"].get(place, 0),
            "holds": trace["peak_bytes"].get(place, 0) <= goal,
        }
        for place, goal in plan["peak_bytes"].items()
    }


def _speed_bars(ours: Result, others: list[Result]) -> dict[str, Any]:
    reached = ours.figures["tokens_per_s"]
    return {
        f"tokens/s of {other.label}": {
            "goal": other.figures["tokens_per_s"],
            "reached": reached,
            "holds": reached >= other.figures["tokens_per_s"],
        }
        for other in others
        if other.figures
    }
