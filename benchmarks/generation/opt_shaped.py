"""An OPT-shaped model with random weights in a folder, and one run of it under a memory budget.

    python benchmarks/generation/opt_shaped.py --size 6.7b --device-memory 16GiB --host-memory 100GiB

Question: does the engine run the real shape within the budget, and does the trace match the plan?
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OPTConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.generation import Engine, Request
from capstan.generation.batching import Length
from capstan.hardware import this_machine
from capstan.plans import compare, explain
from record import RECORDS, write_record

SHAPES = {
    "125m": (768, 3072, 12, 12),
    "1.3b": (2048, 8192, 24, 32),
    "6.7b": (4096, 16384, 32, 32),
    "30b": (7168, 28672, 48, 56),
}


def make_model(folder: Path, size: str) -> None:
    """Write config.json and random float16 weights, a shard for each layer."""
    hidden, ffn, layers, heads = SHAPES[size]
    folder.mkdir(parents=True, exist_ok=True)
    config = OPTConfig(
        vocab_size=50272,
        hidden_size=hidden,
        ffn_dim=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        word_embed_proj_dim=hidden,
        max_position_embeddings=2048,
        dtype="float16",
        architectures=["OPTForCausalLM"],
    )
    config.save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float16)
        return values.mul_(0.02).cpu()

    def norm(prefix: str) -> dict[str, torch.Tensor]:
        ones, zeros = torch.ones(hidden, dtype=torch.float16), torch.zeros(hidden, dtype=torch.float16)
        return {f"{prefix}.weight": ones, f"{prefix}.bias": zeros}

    decoder = "model.decoder"
    shards = {
        "model-embeddings.safetensors": {
            f"{decoder}.embed_tokens.weight": normal(50272, hidden),
            f"{decoder}.embed_positions.weight": normal(2050, hidden),
            **norm(f"{decoder}.final_layer_norm"),
        }
    }
    weight_map = {}
    for layer in range(-1, layers):
        if layer < 0:
            name, tensors = next(iter(shards.items()))
        else:
            name, prefix = f"model-layer-{layer:02d}.safetensors", f"{decoder}.layers.{layer}"
            tensors = {**norm(f"{prefix}.self_attn_layer_norm"), **norm(f"{prefix}.final_layer_norm")}
            for matrix in ("q_proj", "k_proj", "v_proj", "out_proj"):
                tensors[f"{prefix}.self_attn.{matrix}.weight"] = normal(hidden, hidden)
                tensors[f"{prefix}.self_attn.{matrix}.bias"] = normal(hidden)
            tensors |= {f"{prefix}.fc1.weight": normal(ffn, hidden), f"{prefix}.fc1.bias": normal(ffn)}
            tensors |= {f"{prefix}.fc2.weight": normal(hidden, ffn), f"{prefix}.fc2.bias": normal(hidden)}
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="125m")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--device-memory", default="16GiB")
    parser.add_argument("--host-memory", default="100GiB")
    parser.add_argument("--weight-bits", type=int, default=None)
    parser.add_argument("--cache-bits", type=int, default=None)
    parser.add_argument("--place", action="append", default=[])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--record", default=None, help="name of the record to write")
    parser.add_argument("--folder-of-records", type=Path, default=RECORDS)
    options = parser.parse_args()

    folder = options.folder or Path(f"/tmp/opt-{options.size}")
    if not (folder / "model.safetensors.index.json").exists():
        make_model(folder, options.size)
    machine = this_machine(budget_s=15)
    start_s = time.perf_counter()
    with Engine.open(
        folder,
        device_memory=options.device_memory,
        host_memory=options.host_memory,
        weight_bits=options.weight_bits,
        cache_bits=options.cache_bits,
        place=options.place,
        lengths=[Length(options.prompt, options.new)] * options.sequences,
        machine=machine,
    ) as engine:
        print(f"opened in {time.perf_counter() - start_s:.1f} s")
        print(explain(engine.plan), flush=True)
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(3, 50272, (options.sequences, options.prompt), generator=generator)
        requests = [
            Request(prompt=prompt, max_tokens=options.new, ignore_eos=True) for prompt in prompts.tolist()
        ]
        start_s = time.perf_counter()
        num_tokens = sum(len(each.answers[0].tokens) for each in engine.generate(requests))
        seconds = time.perf_counter() - start_s
        plan, trace = engine.plan, engine.trace
    assert trace is not None
    print(compare(plan, trace))
    speed = num_tokens / trace.seconds
    print(f"{num_tokens} tokens, {speed:.1f} tokens/s in sweeps, {num_tokens / seconds:.1f} with everything")
    if options.record:
        write_record(
            options.record,
            claim=f"an OPT-{options.size}-shaped model runs within {options.device_memory} of device memory",
            machine=machine,
            figures={
                "tokens_per_s": {"value": speed, "unit": "tokens/s"},
                "predicted_tokens_per_s": {"value": num_tokens / plan.seconds, "unit": "tokens/s"},
            },
            bound={"formula": "the plan's busiest resource, phase by phase", "seconds": plan.seconds},
            bars={
                name: {
                    "goal": plan.peak_bytes[name],
                    "reached": trace.peak_bytes.get(name, 0),
                    "holds": trace.peak_bytes.get(name, 0) <= plan.peak_bytes[name],
                }
                for name in plan.peak_bytes
            },
            folder=options.folder_of_records,
            plan=plan.to_dict(),
            trace=trace.to_dict(),
        )


if __name__ == "__main__":
    main()
