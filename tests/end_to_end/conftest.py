"""A tiny Llama with a tokenizer of its own, a profile of this machine, and a batch file."""

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from capstan.hardware import Device, Link, Machine
from capstan.hardware.profile import profile_path, save_profile

_TEXT = (
    "a capstan turns and hauls the anchor up while sailors sing the same old song of wind and water "
    "ropes over wooden decks under grey skies until every ship in the harbour has its sails set for home"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of three layers, float32, and a byte-level tokenizer of 300 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = LlamaForCausalLM(config)
        with torch.no_grad():
            # As initialised, every token follows itself: nothing could be mistaken.
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() > 1 else 0.02)
    network.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment for a command: one thread, and a profile at hand, so that nothing is probed."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPSTAN_CACHE", str(cache))
        save_profile(_machine(cache), profile_path("cpu"))
    return os.environ | {
        "CAPSTAN_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def _machine(folder: Path) -> Machine:
    compute = {"matmul_flops_per_s": {"float32": 100e9}, "memory_bandwidth_bytes_per_s": 30e9}
    rates = {
        ("host", "device"): 10e9,
        ("device", "host"): 10e9,
        ("disk", "host"): 1e9,
        ("host", "disk"): 0.5e9,
    }
    return Machine(
        name=socket.gethostname(),
        cores=2,
        probed_at="2026-11-23T00:00:00+00:00",
        devices=(
            Device(name="device", kind="cpu", memory_bytes=4 * 2**30, **compute),
            Device(name="host", kind="host", memory_bytes=8 * 2**30, **compute),
            Device(
                name="disk",
                kind="disk",
                memory_bytes=80 * 2**30,
                memory_bandwidth_bytes_per_s=1e9,
                identity=str(folder),
            ),
        ),
        links=tuple(
            Link(source=source, target=target, bandwidth_bytes_per_s=rate, latency_s=1e-5)
            for (source, target), rate in rates.items()
        ),
    )


@pytest.fixture(scope="session")
def write_requests() -> Callable[..., None]:
    """`write_requests(path, count, max_tokens)`: requests of many lengths, `request-0`, `request-1`, …"""

    def write_requests(path: Path, count: int, max_tokens: Callable[[int], int], **settings: Any) -> None:
        lines, known = [], _TEXT.split()
        for index in range(count):
            words = [known[(5 * index + step) % len(known)] for step in range(1 + (7 * index) % 13)]
            body = {"prompt": " ".join(words), "max_tokens": max_tokens(index), **settings}
            lines.append(json.dumps({"custom_id": f"request-{index}", "body": body}))
        path.write_text("\n".join(lines) + "\n")

    return write_requests


@pytest.fixture(scope="session")
def read_lines() -> Callable[[Path], list[dict[str, Any]]]:
    """`read_lines(path)`: the objects of a JSONL file that is whole."""

    def read_lines(path: Path) -> list[dict[str, Any]]:
        text = path.read_text()
        assert text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]

    return read_lines
