"""How many requests a second does the server answer, beside transformers' own, and what does it weigh?

    python benchmarks/generation/serving.py --peer-python /path/to/env/bin/python --record NAME

Expected before the run (docs/serving.md): at 64 clients at least 4 times fewer seconds than a server that
computes one request at a time; at most 40 MB more memory than the engine alone answering the same requests.

Every server gets the same model, the same prompts and the same clients, one server after the other. Clients
run beside the server, on the same processors. The peer is `transformers serve` in an environment of its own,
as it starts by default and with its continuous batching.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
from harness_agreement import write_model
from serving_programs import Program, served, served_by_transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.hardware import this_machine
from record import RECORDS, write_record

LONGEST, SLOTS = 256, 64
GOALS = {"times fewer seconds": 4.0, "MB added": 40.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path, required=True, help="where transformers[serving] is")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--record", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, log = Path(work) / "rigging", Path(work) / "log"
        write_model(folder, _documents(), hidden=options.hidden, layers=options.layers)
        bodies = _bodies(options.requests, options.new)
        runs: Runs = {}
        with served(folder, "--slots", str(SLOTS), longest=LONGEST) as program:
            measure("capstan", program, bodies, options.clients, runs)
        tiny = Path(work) / "dinghy"
        write_model(tiny, _documents(), hidden=64, layers=2)
        with served(tiny, "--slots", str(SLOTS), longest=LONGEST) as program:
            many = _bodies(2000, 16)
            measure("capstan, tiny model", program, many, [max(options.clients)], runs, each=2000)
        peer = (folder, options.peer_python, log)
        with served_by_transformers(*peer) as program:
            measure("transformers", program, bodies, options.clients, runs)
        try:
            with served_by_transformers(*peer, "--continuous-batching") as program:
                measure("transformers, continuous batching", program, bodies, options.clients, runs)
        except (SystemExit, RuntimeError, httpx.HTTPError) as error:
            print(f"continuous batching: {error}")
            runs["transformers, continuous batching"] = {"failure": str(error)[:300]}
        alone_bytes = _alone(folder, bodies)
    report(runs, alone_bytes, options)


def _documents() -> list[dict[str, str]]:
    return [{"question": f"{one} ropes and {one + 7} bars lie on deck."} for one in range(50)]


def _bodies(count: int, new: int) -> list[dict[str, Any]]:
    """Requests of 16 to 64 words."""
    chance = random.Random(7)
    words = ["ropes", "and", "bars", "lie", "on", "deck", "how", "many", "things", "are", "that"]
    prompts = [" ".join(chance.choices(words, k=chance.randrange(16, 65))) for _ in range(count)]
    return [{"prompt": prompt, "max_tokens": new, "temperature": 0} for prompt in prompts]


# --- measuring -------------------------------------------------------------------------------------------


Runs = dict[str, dict[str, Any]]


def measure(
    name: str,
    program: Program,
    bodies: list[dict[str, Any]],
    clients: list[int],
    runs: Runs,
    each: int = 16,
) -> None:
    """Ask everything with so many clients at a time, fewer requests where there are fewer clients."""
    asyncio.run(_ask(program.url, bodies[:4], 2))  # what is loaded at first use
    for count in clients:
        some = bodies[: min(len(bodies), each * count)]
        start_s = time.perf_counter()
        answers = asyncio.run(_ask(program.url, some, count))
        seconds = time.perf_counter() - start_s
        tokens = sum(answer["usage"]["completion_tokens"] for answer, _ in answers)
        runs[f"{name}, {count} clients"] = {
            "seconds": seconds,
            "requests": len(some),
            "requests/s": len(some) / seconds,
            "tokens/s": tokens / seconds,
            "median latency": statistics.median(latency_s for _, latency_s in answers),
            "rss": program.rss_bytes / 1e6,
            "texts": [answer["choices"][0]["text"] for answer, _ in answers],
        }
        print(
            name,
            count,
            {key: value for key, value in runs[f"{name}, {count} clients"].items() if key != "texts"},
        )


async def _ask(url: str, bodies: list[dict[str, Any]], clients: int) -> list[tuple[dict[str, Any], float]]:
    answers: list[Any] = [None] * len(bodies)
    left = iter(range(len(bodies)))

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:
            for index in left:
                start_s = time.perf_counter()
                response = await http.post("/v1/completions", json=bodies[index])
                if response.status_code != 200:
                    raise RuntimeError(f"{response.status_code}: {response.text[:300]}")
                answers[index] = response.json(), time.perf_counter() - start_s

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


_ALONE = """
import json, sys, psutil
from capstan.generation import Engine, Request
from capstan.generation.runtime.arrivals import Arrivals, open_lengths
folder, longest, slots, bodies = sys.argv[1], *map(json.loads, sys.argv[2:])
with Engine.open(folder, device="cpu", lengths=open_lengths(longest, slots)) as engine:
    arrivals, left = Arrivals(), len(bodies)
    for body in bodies:
        arrivals.put(engine.sequences(Request(prompt=body["prompt"], max_tokens=body["max_tokens"])))
    for _ in engine.answer(arrivals):
        left -= 1
        if not left:
            arrivals.close()
    print(psutil.Process().memory_info().rss)
"""


def _alone(folder: Path, bodies: list[dict[str, Any]]) -> int:
    """Memory of a process in which the engine answers the same requests without a server."""
    arguments = [str(folder), json.dumps(LONGEST), json.dumps(SLOTS), json.dumps(bodies)]
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


# --- what came of it -------------------------------------------------------------------------------------


def report(runs: dict[str, dict[str, Any]], alone_bytes: int, options: argparse.Namespace) -> None:
    most = max(options.clients)
    own, peer = runs[f"capstan, {most} clients"], runs[f"transformers, {most} clients"]
    ratio = peer["seconds"] / own["seconds"]
    added = own["rss"] - alone_bytes / 1e6
    same = sum(one == other for one, other in zip(own["texts"], peer["texts"], strict=True))
    print(
        f"{ratio:.1f} times fewer seconds, {added:.1f} MB added, {same} of {own['requests']} texts are equal"
    )
    if options.record is None:
        return
    shown = {name: {key: value for key, value in run.items() if key != "texts"} for name, run in runs.items()}
    figures = {
        f"{name}: {key}": {
            "value": value,
            "unit": {"rss": "MB", "seconds": "s", "median latency": "s"}.get(key, ""),
        }
        for name, run in shown.items()
        if name.startswith("capstan")
        for key, value in run.items()
    }
    figures |= {
        "memory of the engine alone": {"value": alone_bytes / 1e6, "unit": "MB"},
        "memory that the server adds": {"value": added, "unit": "MB"},
        "equal texts": {"value": same, "unit": f"of {own['requests']}"},
        "times fewer seconds than transformers serve": {"value": ratio, "unit": "×"},
    }
    write_record(
        options.record,
        claim=f"at {most} clients the server needs fewer seconds for these requests than transformers serve",
        machine=this_machine(),
        figures=figures,
        peers={name: run for name, run in shown.items() if not name.startswith("capstan")},
        bound={
            "formula": "one sweep for all running requests, against one for each",
            "value": min(most, SLOTS),
        },
        bars={
            "times fewer seconds": {
                "goal": GOALS["times fewer seconds"],
                "reached": ratio,
                "holds": ratio >= GOALS["times fewer seconds"],
            },
            "MB added": {"goal": GOALS["MB added"], "reached": added, "holds": added <= GOALS["MB added"]},
        },
        folder=RECORDS,
        unfair="a model of a few million parameters; clients on the same two processors as the server",
    )


if __name__ == "__main__":
    main()
