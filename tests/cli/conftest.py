"""The command line in this process, a model without a tokenizer, and a machine whose rates are given."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from capstan.cli import main
from capstan.hardware import Device, Link, Machine


class Ran(NamedTuple):
    """How a command ended. `words` is what it printed, free of line breaks."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", f"{self.out} {self.err}")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`run("generate", "--model", …)`: the exit code and what was printed."""

    def run(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of two layers in float32; prompts must be token ids below 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is probed."""
    compute = {"matmul_flops_per_s": {"float32": 100e9}, "memory_bandwidth_bytes_per_s": 30e9}
    ways = (("host", "device"), ("device", "host"), ("disk", "host"), ("host", "disk"))
    machine = Machine(
        name="test",
        cores=2,
        probed_at="2026-11-23",
        devices=(
            Device(name="device", kind="cpu", memory_bytes=4 * 2**30, **compute),
            Device(name="host", kind="host", memory_bytes=8 * 2**30, **compute),
            Device(name="disk", kind="disk", memory_bytes=80 * 2**30, memory_bandwidth_bytes_per_s=1e9),
        ),
        links=tuple(
            Link(source=source, target=target, bandwidth_bytes_per_s=1e9, latency_s=1e-5)
            for source, target in ways
        ),
    )
    monkeypatch.setattr("capstan.generation.planning.opening.this_machine", lambda device: machine)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """A file of four requests."""
    path = tmp_path / "requests.jsonl"
    bodies: list[dict[str, Any]] = [
        {"prompt": [1 + index, 2, 3 + index], "max_tokens": 2 + index} for index in range(4)
    ]
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path
