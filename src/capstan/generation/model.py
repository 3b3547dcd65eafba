"""A model as the planner and the engine see it: structure, facts, bytes; no weights yet."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from capstan.errors import InputError
from capstan.generation.attention.row_format import RowFormat, cache_codec
from capstan.generation.planning.stage import Stage
from capstan.models.checkpoint_map import Sources, map_checkpoint
from capstan.models.decoded_checkpoint import (
    DecodedCheckpoint,
    dominant_dtype,
    open_checkpoint,
    refuse_transposed,
)
from capstan.models.layer_profile import ModelProfile
from capstan.models.meta_model import MetaModel, open_meta_model
from capstan.models.refusals import refuse_other_models
from capstan.models.weight_manifest import WeightManifest, list_weights
from capstan.storage import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model folder, opened: everything that can be known before a weight is read."""

    folder: Path
    meta_model: MetaModel
    profile: ModelProfile
    checkpoint: Checkpoint
    sources: Sources
    manifest: WeightManifest
    formats: tuple[RowFormat, ...]
    tokenizer: Any
    stop_tokens: frozenset[int]
    stage: Stage | None = None  # of a part of a model: whose part it is

    @property
    def num_layers(self) -> int:
        return self.meta_model.num_layers

    @property
    def num_parameters(self) -> int:
        tensors = [*self.manifest.placeable.values(), *self.manifest.rest]
        return sum(tensor.spec.num_elements for tensor in tensors)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden states."""
        return self.meta_model.hidden_size * self.meta_model.compute_dtype.itemsize

    def part(self, stage: Stage) -> "Model":
        """What a stage holds of the model."""
        meta_model = self.meta_model.part(stage.first, stage.end)
        return replace(
            self,
            meta_model=meta_model,
            profile=ModelProfile(meta_model),
            manifest=self.manifest.part(stage.first, stage.end),
            formats=self.formats[stage.first : stage.end],
            stage=stage,
        )


def open_model(
    folder: Path,
    *,
    device_type: str = "cpu",
    dtype: torch.dtype | None = None,
    weight_bits: int | None = None,
    cache_bits: int | None = None,
    checkpoint: Checkpoint | None = None,
) -> Model:
    """Open a folder in Hugging Face format without reading its weights.

    Args:
        device_type: "cuda" or "cpu", where it will compute.
        dtype: what to compute in; None for the checkpoint's own dtype.
        weight_bits, cache_bits: 16, 8 or 4; None for the checkpoint's own.
        checkpoint: where weights come from, if not from the folder.

    Raises:
        InputError, UnsupportedModel, UsageError: see `open_meta_model`, `Checkpoint`, `map_checkpoint`.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Name a folder with a model in Hugging Face format.")
    refuse_other_models(folder)
    checkpoint = checkpoint or open_checkpoint(folder)
    meta_model = open_meta_model(folder, dtype or dominant_dtype(checkpoint))
    if isinstance(checkpoint, DecodedCheckpoint):
        refuse_transposed(meta_model)
        checkpoint = checkpoint.in_dtype(meta_model.compute_dtype)
    sources = map_checkpoint(meta_model, checkpoint)
    manifest = list_weights(meta_model, checkpoint, sources, weight_bits=weight_bits, device_type=device_type)
    profile = ModelProfile(meta_model)
    formats = tuple(
        RowFormat(
            geometry=layer.geometry,
            codec=cache_codec(
                cache_bits,
                layer.geometry,
                checkpoint_dtype=dominant_dtype(checkpoint),
                compute_dtype=meta_model.compute_dtype,
            ),
            dtype=meta_model.compute_dtype,
            device_type=device_type,
        )
        for layer in profile.layers
    )
    return Model(
        folder=folder,
        meta_model=meta_model,
        profile=profile,
        checkpoint=checkpoint,
        sources=sources,
        manifest=manifest,
        formats=formats,
        tokenizer=_tokenizer(folder),
        stop_tokens=_stop_tokens(folder, meta_model.config),
    )


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None where there is none: requests must then give token ids."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        logger.info("%s has no tokenizer: prompts must be token ids.", folder)
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's own files lead to
        raise InputError(f"The tokenizer in {folder} cannot be read: {error}") from error


def _stop_tokens(folder: Path, config: Any) -> frozenset[int]:
    """The tokens that end an answer: of generation_config.json, or else of config.json."""
    from transformers import GenerationConfig

    stated = getattr(config.get_text_config(), "eos_token_id", None)
    if (folder / "generation_config.json").exists():
        try:
            own = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{folder / 'generation_config.json'}, which says where answers end, cannot be read: {error} "
                "Mend it, or take it away if config.json says so too."
            ) from error
        stated = stated if own is None else own
    if stated is None:
        return frozenset()
    return frozenset(stated if isinstance(stated, list) else [stated])
