"""One rank of a world: forked for test_ranks.py with torchrun's variables; prints a JSON object.

Each case opens an engine, answers, and notes what was answered, what the ledger counted and what was planned.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from capstan.errors import CapstanError
from capstan.generation import Engine, Request, plan_for
from capstan.generation.planning.batching import Length, shape_for
from capstan.generation.planning.placement import parse_wish
from capstan.generation.planning.planner import Planner
from capstan.hardware import Machine


def run(world: dict[str, Any]) -> None:
    machine = Machine.from_dict(world["machine"])
    rank, results = int(os.environ["RANK"]), []
    planners: dict[str, Any] = {}
    shapes = Planner._shapes
    for case in world["cases"]:
        folder = case["folder"]
        if folder not in planners:
            planners[folder] = plan_for(folder, machine=machine, device="cpu", group="auto")[0]
        slots, batches = case.get("shape", (0, 0))

        def forced(_: Planner, job: Any, slots: int = slots, batches: int = batches) -> Any:
            yield shape_for(job.lengths, slots=slots, batches=batches, chunk_tokens=20, prefix=job.prefix)

        Planner._shapes = forced if slots else shapes
        try:
            results.append(_run(case, planners[folder], rank, Path(world["scratch"])))
        except CapstanError as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(results), flush=True)


def _run(case: dict[str, Any], planner: Planner, rank: int, scratch: Path) -> dict[str, Any]:
    budgets = case["budgets"][rank]
    planner = replace(planner, budgets=budgets, wish=parse_wish([case["place"]] if case["place"] else []))
    opening = planner.plan([Length(prompt=17, new=6)] * 5)
    with Engine.start(planner, opening, torch.device("cpu"), disk_folder=scratch) as engine:
        if "texts" in case:
            answers: Any = [score.logprobs for score in engine.score(case["texts"])]
        else:
            done = {each.id: each for each in engine.generate(map(_request, case["requests"]))}
            answers = [_answer(done[str(index)]) for index in range(len(case["requests"]))]
        assert engine.trace is not None
        return {
            "answers": answers,
            "layers": [planner.stage.first, planner.stage.end],
            "planned": engine.plan.traffic.to_dict(),
            "counted": engine.trace.traffic.to_dict(),
            "peak": dict(engine.trace.peak_bytes),
            "planned peak": dict(engine.plan.peak_bytes),
            "waves": next(each.reason for each in engine.plan.choices if each.name.startswith("rank")),
        }


def _request(written: dict[str, Any]) -> Request:
    """JSON has no numbers for names."""
    return Request(**written | {"logit_bias": dict(written.get("logit_bias", ()))})


def _answer(completion: Any) -> dict[str, Any]:
    prompt = completion.prompt_logprobs
    return {
        "tokens": [list(answer.tokens) for answer in completion.answers],
        "reasons": [answer.finish_reason for answer in completion.answers],
        "logprobs": [[_scored(each) for each in answer.logprobs or ()] for answer in completion.answers],
        "prompt": None if prompt is None else [_scored(each) for each in prompt if each is not None],
    }


def _scored(entry: Any) -> list[Any]:
    return [entry.token, entry.logprob, [list(pair) for pair in entry.top]]
