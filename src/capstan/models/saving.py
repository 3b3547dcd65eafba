"""Trained stages as one checkpoint in Hugging Face format: a shard each, and an index of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from capstan.errors import InputError, UsageError
from capstan.models.stage import Stage, StageCut
from capstan.storage import write_atomically

_INDEX = "model.safetensors.index.json"
# What belongs to a model beside its config and its weights.
_COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def save_stage(stage: Stage, cuts: Sequence[StageCut], source: Path, target: Path) -> None:
    """Write a stage's weights to its shard in folder `target`; the first stage also writes the index, the
    config and the tokenizer. The checkpoint is whole when all stages have returned.

    Args:
        cuts: those of all stages.
        source: the folder of the model that was cut.

    Raises:
        UsageError: `cuts` are not those of this stage's model, or `target` has weights of another.
        InputError: `source` has no readable config.json any more, or `target` cannot be written.
        DoesNotFit: the disk is full.
    """
    if stage.cut not in cuts or len(cuts) != stage.cut.num_stages:
        raise UsageError(
            f"Stage {stage.cut.index} is not one of the {len(cuts)} cuts. Give those of all stages."
        )
    refuse_other_weights(len(cuts), source, target)
    names = _shard_names(len(cuts))
    _write_shard(stage, target / names[stage.cut.index])
    if stage.cut.is_first:
        _write_index(stage, cuts, names, target)
        _write_config(stage, source, target)
        for each in _COMPANIONS:
            if (source / each).is_file():
                write_atomically(target / each, (source / each).read_bytes())


def refuse_other_weights(num_stages: int, source: Path, target: Path) -> None:
    """What `save_stage` would refuse of `target`, to be known before training.

    Raises:
        UsageError: `target` has weights of another model, or is `source`.
    """
    others = {path.name for path in target.glob("*.safetensors")} - set(_shard_names(num_stages))
    if others or source.resolve() == target.resolve():
        raise UsageError(f"{target} holds weights of another model. Name another folder.")


def _shard_names(num_stages: int) -> list[str]:
    return [f"model-{index + 1:05d}-of-{num_stages:05d}.safetensors" for index in range(num_stages)]


def _write_shard(stage: Stage, path: Path) -> None:
    from safetensors.torch import save

    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in stage.tensors().items()
        if name != stage.cut.table_copy
    }
    write_atomically(path, save(tensors, metadata={"format": "pt"}))


def _write_index(stage: Stage, cuts: Sequence[StageCut], names: Sequence[str], target: Path) -> None:
    weight_map = {
        tensor: name
        for cut, name in zip(cuts, names, strict=True)
        for tensor in cut.tensors
        if tensor != cut.table_copy
    }
    index = {"metadata": {}, "weight_map": weight_map}
    write_atomically(target / _INDEX, json.dumps(index, indent=2, sort_keys=True).encode())


def _write_config(stage: Stage, source: Path, target: Path) -> None:
    """The model's own, with the dtype in which its weights are now."""
    try:
        config = json.loads((source / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source / 'config.json'} cannot be read any more: {error}. Put it back."
        ) from error
    config.pop("torch_dtype", None)
    config["dtype"] = str(next(stage.parameters()).dtype).removeprefix("torch.")
    write_atomically(target / "config.json", json.dumps(config, indent=2).encode())
