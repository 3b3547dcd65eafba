"""Models of real shapes with made-up weights: in no file at all, or written as a checkpoint.

Question: what does a model of this shape cost, when only its shape matters and nobody downloads 60 GB?

    python benchmarks/generation/shapes.py --model opt-1.3b --folder /tmp/opt-1.3b    # writes a checkpoint

Matrices are drawn from a normal distribution with deviation 0.02, norms are 1, biases 0. Tensors have the
names and the cut of a published checkpoint: a Mixtral has three matrices an expert.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, core_model_loading

from capstan.storage import Checkpoint
from capstan.storage.checkpoint import TensorRange

DEVIATION = 0.02
# Elements that repeat. A prime: no two rows of a matrix are equal, so no two tokens are equally likely.
BLOCK_ELEMENTS = 1_048_573
INDEX = "model.safetensors.index.json"


def _opt(hidden: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    return "OPTConfig", {
        "vocab_size": 50272,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "word_embed_proj_dim": hidden,
        "max_position_embeddings": 2048,
    }


def _llama(hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> tuple[str, dict[str, Any]]:
    return "LlamaConfig", {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        **more,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# Name → the transformers class of the config, and its sizes.
SHAPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-160m": _llama(768, 3072, 12, 12),
    "llama-0.4b": _llama(1024, 4096, 24, 16),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-30b": _opt(7168, 48, 56),
    "llama-70b": _llama(
        8192,
        28672,
        80,
        64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        **_rope(5e5),
    ),
    "mixtral-8x7b": (
        "MixtralConfig",
        {
            **_llama(4096, 14336, 32, 32, num_key_value_heads=8, max_position_embeddings=32768)[1],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            **_rope(1e6),
        },
    ),
}


def config_of(name: str, dtype: str = "float16") -> PretrainedConfig:
    """The config of a shape. It has no end-of-text token: every answer runs to its full length."""
    class_name, sizes = SHAPES[name]
    config: PretrainedConfig = getattr(transformers, class_name)(
        **sizes, dtype=dtype, bos_token_id=None, eos_token_id=None, pad_token_id=1
    )
    return config


class MadeUpCheckpoint(Checkpoint):
    """A checkpoint whose tensors are runs of one small random block, read at the speed of memory.

    What a plan leaves on disk comes from memory too: use `write_checkpoint` where the disk matters.
    """

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        self.folder = folder
        self.tensors = {entry.name: entry for entry in _published_tensors(folder, config)}
        self._blocks: dict[torch.dtype, torch.Tensor] = {}

    def read(self, name: str, target: torch.Tensor, *, start: int = 0) -> None:
        """Fill `target` (flat uint8, on the host) with bytes of tensor `name`, from its byte `start` on."""
        entry = self.tensors[name]
        assert start + target.numel() <= entry.size_bytes, f"{name}: range beyond the tensor"
        if len(entry.shape) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            whole = torch.full(entry.shape, value, dtype=entry.dtype).view(torch.uint8)
            target.copy_(whole[start : start + target.numel()])
        else:
            _copy_around(
                target, self._block(entry.dtype), start + crc32(name.encode()) * entry.dtype.itemsize
            )

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name`, whole."""
        entry = self.tensors[name]
        content = torch.empty(entry.size_bytes, dtype=torch.uint8)
        self.read(name, content)
        return content.view(entry.dtype).view(entry.shape)

    def close(self) -> None:
        """Forget the block."""
        self._blocks = {}

    def _block(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._blocks:
            values = torch.randn(BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0))
            self._blocks[dtype] = (DEVIATION * values).to(dtype).view(torch.uint8)
        return self._blocks[dtype]


def _copy_around(target: torch.Tensor, block: torch.Tensor, position: int) -> None:
    """Fill `target` from the endless repetition of `block`, from byte `position` on."""
    done = 0
    while done < target.numel():
        begin = (position + done) % block.numel()
        count = min(block.numel() - begin, target.numel() - done)
        np.copyto(target[done : done + count].numpy(), block[begin : begin + count].numpy())
        done += count


def _published_tensors(folder: Path, config: PretrainedConfig) -> Iterator[TensorRange]:
    """Every tensor that a published checkpoint of this config has; tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    once = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in once.values()}
    for name, tensor in core_model_loading.revert_weight_conversion(model, kept).items():
        yield TensorRange(
            name=name,
            file=folder / "made up",
            offset=0,
            size_bytes=prod(tensor.shape) * tensor.dtype.itemsize,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
        )


def random_checkpoint(folder: Path, config: PretrainedConfig) -> MadeUpCheckpoint:
    """Write config.json only; the weights are made up as they are read."""
    _save_config(folder, config)
    return MadeUpCheckpoint(folder, config)


def write_checkpoint(folder: Path, config: PretrainedConfig) -> Path:
    """Write the same values as safetensors, a shard for each layer; one that is there already stays."""
    made_up = MadeUpCheckpoint(folder, config)
    if (folder / INDEX).exists() and Checkpoint(folder).tensors.keys() == made_up.tensors.keys():
        written = Checkpoint(folder).tensors.values()
        if all((each.shape, each.dtype) == _form(made_up.tensors[each.name]) for each in written):
            return folder
    (folder / INDEX).unlink(missing_ok=True)
    _save_config(folder, config)
    shards: defaultdict[str, list[str]] = defaultdict(list)
    for name in made_up.tensors:
        layer = re.search(r"\.(\d+)\.", name)
        shards[f"model-layer-{int(layer[1]):03d}" if layer else "model-rest"].append(name)
    for shard, names in shards.items():
        tensors = {name: made_up.tensor(name) for name in names}
        save_file(tensors, folder / f"{shard}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"{shard}.safetensors" for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": made_up.size_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))  # last: a folder that has it is complete
    return folder


def _form(entry: TensorRange) -> tuple[tuple[int, ...], torch.dtype]:
    return entry.shape, entry.dtype


def _save_config(folder: Path, config: PretrainedConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    options = parser.parse_args()
    config = config_of(options.model, options.dtype)
    print(f"{MadeUpCheckpoint(options.folder, config).size_bytes:,} bytes go to {options.folder}", flush=True)
    write_checkpoint(options.folder, config)


if __name__ == "__main__":
    main()
