"""Real memory, seen from outside: what the process takes, not what it says it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_LAYERS, _HIDDEN, _FFN = 24, 256, 704
_RUN = """
import json, resource, sys
from pathlib import Path

import torch
from capstan.generation import Engine, Request
from capstan.generation.planning.batching import Length
from capstan.hardware import Machine

def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

folder, settings = sys.argv[1], json.loads(sys.argv[3])
machine = Machine.from_json(Path(sys.argv[2]).read_text())
torch.ones(256, 256) @ torch.ones(256, 256)
before = peak_bytes()
lengths = [Length(prompt=24, new=4)] * 8
with Engine.open(folder, device="cpu", machine=machine, lengths=lengths, **settings) as engine:
    requests = [Request(prompt=list(range(1, 25)), max_tokens=4) for _ in lengths]
    tokens = [completion.answers[0].tokens for completion in engine.generate(requests)]
    trace, plan = engine.trace, engine.plan
print(json.dumps({
    "growth": peak_bytes() - before,
    "accounted": dict(trace.peak_bytes),
    "planned": dict(plan.peak_bytes),
    "tokens": tokens,
    "bytes": trace.traffic.to_dict(),
}))
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of some 70 MB in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=_HIDDEN,
        intermediate_size=_FFN,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def machine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from capstan.hardware import Device, Link, Machine

    rates = {"matmul_flops_per_s": {"float32": 100e9}, "memory_bandwidth_bytes_per_s": 30e9}
    tiers = {"device": "cpu", "host": "host", "disk": "disk"}
    ways = (("host", "device"), ("device", "host"), ("disk", "host"), ("host", "disk"))
    machine = Machine(
        name="test",
        cores=2,
        probed_at="2026-11-23",
        devices=tuple(
            Device(name=name, kind=kind, memory_bytes=8 * 2**30, **rates) for name, kind in tiers.items()
        ),
        links=tuple(
            Link(source=source, target=target, bandwidth_bytes_per_s=1e9, latency_s=1e-5)
            for source, target in ways
        ),
    )
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    path.write_text(machine.to_json())
    return path


def _run(model_folder: Path, machine_file: Path, **settings: object) -> dict:
    arguments = [str(model_folder), str(machine_file), json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, check=True, timeout=200
    )
    return json.loads(done.stdout)


def _greedy(model_folder: Path) -> list[int]:
    import torch
    from transformers import LlamaForCausalLM

    prompt = torch.arange(1, 25)[None]
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    return answer[0, 24:].tolist()


def test_the_process_grows_by_little_more_than_what_was_placed(
    model_folder: Path, machine_file: Path
) -> None:
    ran = _run(
        model_folder,
        machine_file,
        device_memory="64MiB",
        host_memory="128MiB",
        place=["weights=host", "cache=host"],
    )
    placed = sum(ran["accounted"].values())
    assert ran["accounted"]["host"] > 60e6, "the weights must lie on the host, or this shows nothing"
    assert ran["growth"] <= 1.10 * placed + 200 * 2**20
    assert all(ran["accounted"][tier] <= planned for tier, planned in ran["planned"].items())


def test_a_model_three_times_the_memory_granted_completes_from_disk(
    model_folder: Path, machine_file: Path
) -> None:
    granted = {"device_memory": 12 * 10**6, "host_memory": 8 * 10**6}
    size = (model_folder / "model.safetensors").stat().st_size
    assert size >= 3 * sum(granted.values())
    ran = _run(model_folder, machine_file, **granted)
    assert ran["bytes"]["disk->host"]["weights"] > size, "the weights were read again in every sweep"
    assert ran["tokens"] == [_greedy(model_folder)] * 8
    assert ran["accounted"]["device"] <= granted["device_memory"]
    assert ran["accounted"]["host"] <= granted["host_memory"]
    # What is granted, and what Python and torch take for a first job however small the model.
    assert ran["growth"] <= sum(granted.values()) + 200 * 2**20
