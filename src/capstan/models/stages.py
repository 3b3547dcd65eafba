"""A causal language model cut into stages for training: what each holds, and the stages themselves.

    cuts = cut_causal_lm(folder, num_stages=4)      # on every rank; reads no weights
    stage = load_stage(folder, cuts[rank])          # reads this stage's bytes only
    values = stage(token_ids_or_hidden_states)

Stage after stage, they compute what the whole model does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from capstan.errors import InputError, UnsupportedModel, UsageError, require_extra
from capstan.models.balance import balanced_ends
from capstan.models.checkpoint_map import Piece, Sources, map_checkpoint
from capstan.models.layer_profile import flops_per_token
from capstan.models.meta_model import MetaModel, TensorSpec
from capstan.models.on_meta import build_on_meta
from capstan.models.refusals import refuse_quantised
from capstan.models.seams import Ends, find_ends
from capstan.models.stage import Stage, StageCut
from capstan.storage import Checkpoint


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model folder and all that is known of it before weights are read."""

    meta: MetaModel
    ends: Ends
    checkpoint: Checkpoint
    sources: Sources


def cut_causal_lm(
    folder: Path, num_stages: int, *, dtype: torch.dtype = torch.float32
) -> tuple[StageCut, ...]:
    """Cut the model in `folder` (Hugging Face format) into stages of consecutive layers, such that the one
    with most arithmetic has least; looking tokens up in the embedding is free. No weight is read.

    Args:
        dtype: what stages are trained in.

    Raises:
        UsageError: fewer layers than stages.
        InputError: the folder holds no model, or config and weights differ.
        UnsupportedModel: the model cannot be cut between its layers.
    """
    return _cut(_open(folder, dtype), num_stages)


def load_stage(folder: Path, cut: StageCut, *, dtype: torch.dtype = torch.float32) -> Stage:
    """Build one stage of the model in `folder`, in training mode, and read its weights and no others.

    Raises:
        UsageError: it is not the model that was cut.
        InputError, UnsupportedModel: see `cut_causal_lm`.
    """
    opened = _open(folder, dtype)
    if _cut(opened, cut.num_stages)[cut.index] != cut:
        raise UsageError(f"{folder} does not hold the model that was cut. Cut it again, with the same dtype.")
    meta = opened.meta
    with opened.checkpoint as checkpoint:
        weights = {
            name: _read(checkpoint, opened.sources[name], meta.state[name])
            for name in _stored_names(meta, cut)
        }
    if cut.is_last and meta.is_tied:
        weights[meta.head_parameter] = weights[meta.table] if cut.is_first else weights.pop(meta.table)
    return Stage(meta, cut, opened.ends, weights)


def _open(folder: Path, dtype: torch.dtype) -> _Opened:
    require_extra("generation", "torch", "transformers", "safetensors")
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Name a folder with a model in Hugging Face format.")
    refuse_quantised(folder, "Give plain weights.")
    checkpoint = Checkpoint(folder)
    model, config = build_on_meta(folder, dtype, attention=None)
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise UnsupportedModel(
            f"{folder} is trained with a loss of its routers (output_router_logits in its config.json), for "
            "which every layer's would have to reach the last stage. Switch it off there."
        )
    # It would look for padding among the token ids, only to warn of it.
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None
    meta = MetaModel(model, config)
    _refuse_shared(meta)
    with checkpoint:
        sources = map_checkpoint(meta, checkpoint)
    return _Opened(meta=meta, ends=find_ends(meta), checkpoint=checkpoint, sources=sources)


def _refuse_shared(meta: MetaModel) -> None:
    owners: dict[int, str] = {}
    for name, holder, key in meta.slots():
        owner = owners.setdefault(id(holder[key]), name)
        if owner != name and {owner, name} != {meta.table, meta.head_parameter}:
            raise UnsupportedModel(
                f"{type(meta.model).__name__} uses one weight as {owner} and as {name}; in two stages its "
                "copies would drift apart. Of shared weights only a tied output matrix can be cut."
            )


def _cut(opened: _Opened, num_stages: int) -> tuple[StageCut, ...]:
    meta = opened.meta
    if not 1 <= num_stages <= meta.num_layers:
        raise UsageError(
            f"A model of {meta.num_layers} layers cannot be cut into {num_stages} stages. Choose 1 to "
            f"{meta.num_layers}."
        )
    flops = [flops_per_token(meta, index) for index in range(meta.num_layers)]
    flops[-1] += 2.0 * meta.state[meta.head_parameter].num_elements
    ends = balanced_ends(flops, num_stages)
    return tuple(
        _stage_cut(opened, index, num_stages, first, end, sum(flops[first:end]))
        for index, (first, end) in enumerate(pairwise([0, *ends]))
    )


def _stage_cut(opened: _Opened, index: int, num_stages: int, first: int, end: int, flops: float) -> StageCut:
    meta, ends = opened.meta, opened.ends
    names = {each.name for layer in range(first, end) for each in meta.layer_tensors(layer)} | ends.everywhere
    names |= ends.front if index == 0 else frozenset()
    names |= ends.back if index == num_stages - 1 else frozenset()
    cut = StageCut(
        index=index,
        num_stages=num_stages,
        first=first,
        end=end,
        tensors=tuple(name for name in meta.state if name in names),
        num_parameters=0,
        stored_bytes=0,
        flops_per_token=flops,
        table=meta.table if meta.is_tied and index == 0 else None,
        table_copy=meta.head_parameter if meta.is_tied and index == num_stages - 1 else None,
        table_shape=(meta.state[meta.table].shape[0], meta.embedding_width),
        hidden_size=meta.hidden_size,
        max_positions=meta.max_positions,
    )
    stored = _stored_names(meta, cut)
    pieces = [opened.checkpoint.tensors[piece.source] for name in stored for piece in opened.sources[name]]
    return replace(
        cut,
        num_parameters=sum(meta.state[name].num_elements for name in stored),
        stored_bytes=sum(piece.size_bytes for piece in pieces),
    )


def _stored_names(meta: MetaModel, cut: StageCut) -> list[str]:
    """The names under which a stage's tensors are in the checkpoint: of a tied model's head, the table's."""
    return list(dict.fromkeys(meta.head if name == meta.head_parameter else name for name in cut.tensors))


def _read(checkpoint: Checkpoint, pieces: Sequence[Piece], spec: TensorSpec) -> Tensor:
    sources = [checkpoint.tensors[piece.source] for piece in pieces]
    stored = torch.empty(spec.num_elements, dtype=sources[0].dtype)
    data, itemsize = stored.view(torch.uint8), stored.itemsize
    for piece, source in zip(pieces, sources, strict=True):
        start = piece.start * itemsize
        checkpoint.read(source.name, data[start : start + source.size_bytes])
    values = stored.view(spec.shape).to(spec.dtype)
    return nn.Parameter(values) if values.is_floating_point() else values
