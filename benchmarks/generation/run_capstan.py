"""One run of Capstan: a `Job` as JSON in, a JSON line out. Started by side_by_side.py."""

import inspect
from pathlib import Path
from typing import Any

import torch
from workload import Job, Outcome, prompts_of, run, settled

from capstan.generation import Engine, Request
from capstan.generation.planning.batching import Length
from capstan.plans import compare, explain


def generate(job: Job) -> Outcome:
    prompts = prompts_of(job)
    requests = [Request(prompt=prompt, max_tokens=job.new, ignore_eos=True) for prompt in prompts]
    notes: list[str] = []
    start_s = settled(job.device)
    with Engine.open(
        job.folder,
        device=job.device,
        device_memory=job.device_memory,
        host_memory=job.host_memory,
        disk=job.disk,
        weight_bits=job.weight_bits,
        cache_bits=job.cache_bits,
        place=job.place,
        lengths=[Length(len(prompt), job.new) for prompt in prompts],
        prefix=job.shared_prefix,
        **_checkpoint(job),
        **_compute_dtype(job),
        **_sharing(job, notes),
    ) as engine:
        opening_s = settled(job.device) - start_s
        print(explain(engine.plan), flush=True)
        if job.made_up and engine.plan.traffic.of("weights").on("disk->host"):
            raise SystemExit("The plan reads weights from disk, and these are in no file: --weights written.")
        start_s = settled(job.device)
        answers = {int(each.id): list(each.answers[0].tokens) for each in engine.generate(requests)}
        seconds = settled(job.device) - start_s
        plan, trace = engine.plan, engine.trace
    assert trace is not None
    print(compare(plan, trace), flush=True)
    phases = {phase.name: phase.seconds for phase in trace.phases}
    return Outcome(
        tokens=[answers[index] for index in range(job.sequences)],
        opening_s=opening_s,
        seconds=seconds,
        prefill_s=phases.get("prefill"),
        decode_s=phases.get("decode"),
        details={
            "predicted_tokens_per_s": job.sequences * job.new / plan.seconds,
            "plan": plan.to_dict(),
            "trace": trace.to_dict(),
            "notes": notes,
        },
    )


def _checkpoint(job: Job) -> dict[str, Any]:
    if not job.made_up:
        return {}
    from shapes import config_of, random_checkpoint

    return {"checkpoint": random_checkpoint(Path(job.folder), config_of(job.model, job.dtype))}


def _compute_dtype(job: Job) -> dict[str, Any]:
    """float32 stays float32; of narrower ones the engine chooses what the machine computes fastest."""
    return {"dtype": torch.float32} if job.dtype == "float32" else {}


def _sharing(job: Job, notes: list[str]) -> dict[str, Any]:
    if "share_prefixes" in inspect.signature(Engine.open).parameters:
        return {"share_prefixes": job.share_prefixes}
    if job.share_prefixes:
        notes.append("this engine cannot share prefixes: it ran without")
    return {}


if __name__ == "__main__":
    run(generate, "capstan-ml", "transformers")
