"""One run of FlexLLMGen (formerly FlexGen) from its source: a `Job` as JSON in, a JSON line out.

It is driven as its own `flex_opt.py` drives it: its flags make the policy, weights are its dummy ones, one
token is generated to warm up, and then `OptLM.generate` gets the prompts. It knows OPT only, pads prompts to
one length, and needs a CUDA device.
"""

import argparse
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workload import Job, Outcome, prompts_of, run, settled

PADDING = 1  # what FlexLLMGen masks


def generate(job: Job) -> Outcome:
    if not torch.cuda.is_available():
        raise SystemExit("FlexLLMGen needs a CUDA device.")
    package = _package(job.flexllmgen_path)
    flex = import_module(f"{package}.flex_opt")
    flags = _flags(flex, job.flexllmgen_policy)
    block = flags.gpu_batch_size * flags.num_gpu_batches
    prompts = _padded(prompts_of(job))
    if len(prompts) % block:
        raise SystemExit(f"{len(prompts)} sequences are no whole number of blocks of {block}.")
    gpu, cpu = flex.TorchDevice("cuda:0"), flex.TorchDevice("cpu")
    disk = flex.TorchDisk(str(Path(job.disk) / "flexllmgen"))
    env = flex.ExecutionEnv(gpu=gpu, cpu=cpu, disk=disk, mixed=flex.TorchMixedDevice([gpu, cpu, disk]))
    try:
        start_s = settled(job.device)
        config = flex.get_opt_config(f"facebook/{job.model}")
        model = flex.OptLM(config, env, flex.DUMMY_WEIGHT, _policy(flex, flags))
        opening_s = settled(job.device) - start_s
        model.generate(prompts[:block, -32:], max_new_tokens=1)  # its own warm-up
        return _generate(job, model, prompts, block, opening_s, import_module(f"{package}.timer").timers)
    finally:
        env.close_copy_threads()


def _generate(
    job: Job, model: Any, prompts: np.ndarray, block: int, opening_s: float, timers: Any
) -> Outcome:
    prefill_s, tokens = 0.0, []
    start_s = settled(job.device)
    for first in range(0, len(prompts), block):
        timers("generate").reset()
        output = model.generate(prompts[first : first + block], max_new_tokens=job.new)
        prefill_s += timers("generate").costs[0]
        tokens += output[:, prompts.shape[1] :].tolist()
    seconds = settled(job.device) - start_s
    return Outcome(
        tokens=tokens,
        opening_s=opening_s,
        seconds=seconds,
        prefill_s=prefill_s,
        decode_s=seconds - prefill_s,
        details={"policy": job.flexllmgen_policy, "block": block, "weights": "its own dummy ones"},
    )


def _package(path: str) -> str:
    sys.path.insert(0, path)
    for name in ("flexllmgen", "flexgen"):
        if find_spec(name) is not None:
            return name
    raise SystemExit(f"{path} holds neither a flexllmgen nor a flexgen package.")


def _flags(flex: Any, policy: str) -> Any:
    parser = argparse.ArgumentParser()
    flex.add_parser_arguments(parser)
    return parser.parse_args(shlex.split(policy))


def _policy(flex: Any, flags: Any) -> Any:
    weight_grid, cache_grid = (
        flex.CompressionConfig(num_bits=4, group_size=64, group_dim=dim, symmetric=False) for dim in (0, 2)
    )
    return flex.Policy(
        flags.gpu_batch_size,
        flags.num_gpu_batches,
        *flags.percent,
        flags.overlap,
        flags.sep_layer,
        flags.pin_weight,
        flags.cpu_cache_compute,
        flags.attn_sparsity,
        flags.compress_weight,
        weight_grid,
        flags.compress_cache,
        cache_grid,
    )


def _padded(prompts: list[list[int]]) -> np.ndarray:
    longest = max(map(len, prompts))
    return np.array([[PADDING] * (longest - len(each)) + each for each in prompts], dtype=np.int32)


if __name__ == "__main__":
    run(generate, "transformers")
