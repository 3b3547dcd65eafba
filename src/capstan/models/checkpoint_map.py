"""Which bytes of the checkpoint make which tensor of the model.

Checkpoints and models do not always cut tensors alike: a Mixtral checkpoint has three matrices an expert,
transformers' model has two tensors for all experts of a layer. transformers describes the difference as
weight conversions; here the ones that only rename, stack or join are turned into *pieces*, runs of
checkpoint elements with their place in the model's tensor. So a tensor that stays on disk is assembled
straight from the original files, each time it is visited.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from capstan.errors import InputError, UnsupportedModel
from capstan.models.meta_model import MetaModel, TensorSpec
from capstan.storage import Checkpoint, TensorRange

_STACK = "MergeModulelist"
_JOIN = "Concatenate"
# Two output matrices are compared in runs of so many bytes.
_COMPARED_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """All elements of checkpoint tensor `source`, at element `start` of the model's tensor."""

    source: str
    start: int


Sources = Mapping[str, tuple[Piece, ...]]


class _Candidate(NamedTuple):
    """A checkpoint tensor that goes into a model tensor, through a conversion's pattern or by name alone."""

    source: TensorRange
    pattern: str | None


def map_checkpoint(meta: MetaModel, checkpoint: Checkpoint) -> Sources:
    """For every tensor of the model, the pieces of the checkpoint that make it.

    Raises:
        InputError: tensors are missing from the checkpoint or have another shape.
        UnsupportedModel: the checkpoint's layout differs by more than renaming, stacking and joining.
    """
    from transformers import core_model_loading  # it builds models, and takes as long as torch to import

    conversions = meta.conversions
    renamings = [each for each in conversions if isinstance(each, core_model_loading.WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, core_model_loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    candidates: defaultdict[str, list[_Candidate]] = defaultdict(list)
    prefix = meta.model.base_model_prefix
    for name, source in checkpoint.tensors.items():
        if name in meta.state:
            candidates[name].append(_Candidate(source, None))
            continue
        target, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, prefix, meta.state
        )
        candidates[target].append(_Candidate(source, pattern))

    if meta.is_tied and meta.head_parameter != meta.table:
        _settle_tie(meta, checkpoint, candidates)
    for name, source in meta.model.all_tied_weights_keys.items():
        if name not in candidates and source in candidates:  # as the bias of BERT's output, saved once
            candidates[name] = candidates[source]
    wanted = {name: spec for name, spec in meta.state.items() if not _is_alias(meta, name)}
    missing = [name for name in wanted if name not in candidates]
    if missing:
        raise InputError(
            f"The checkpoint in {checkpoint.folder} lacks {len(missing)} of the {len(wanted)} tensors of "
            f"{type(meta.model).__name__}: {', '.join(missing[:3])}… {_why_missing(meta)}"
        )
    return {name: _pieces(spec, candidates[name], by_pattern) for name, spec in wanted.items()}


def _why_missing(meta: MetaModel) -> str:
    stated = (getattr(meta.config, "architectures", None) or [None])[0]
    if stated not in (None, type(meta.model).__name__):
        return f"It was saved as {stated}; give one that was saved with what predicts the next token."
    return "Its config.json and its weights do not belong together, or a file is missing."


def _settle_tie(meta: MetaModel, checkpoint: Checkpoint, candidates: dict[str, list[_Candidate]]) -> None:
    """Of a model that its config calls tied, the checkpoint may have only the output matrix, which is the
    table then, or both; two that differ are not tied, as in transformers."""
    table, head = candidates.get(meta.table, []), candidates.get(meta.head_parameter, [])
    if head and not table:
        candidates[meta.table] = head
    elif len(head) == len(table) == 1 and not _are_equal(checkpoint, head[0].source, table[0].source):
        meta.untie()


def _are_equal(checkpoint: Checkpoint, one: TensorRange, other: TensorRange) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.size_bytes, _COMPARED_BYTES):
        size_bytes = min(_COMPARED_BYTES, one.size_bytes - start)
        runs = [torch.empty(size_bytes, dtype=torch.uint8) for _ in range(2)]
        for source, run in zip((one, other), runs, strict=True):
            checkpoint.read(source.name, run, start=start)
        if not torch.equal(*runs):
            return False
    return True


def _is_alias(meta: MetaModel, name: str) -> bool:
    """The output matrix of a tied model is the table under another name."""
    return meta.is_tied and name == meta.head_parameter and name != meta.table


def _pieces(spec: TensorSpec, found: list[_Candidate], by_pattern: Mapping[str, Any]) -> tuple[Piece, ...]:
    if len(found) == 1 and found[0].pattern is None:
        pieces: tuple[Piece, ...] = (Piece(source=found[0].source.name, start=0),)
    else:
        pieces = _converted_pieces(spec, found, by_pattern)
    total = sum(each.source.size_bytes // each.source.dtype.itemsize for each in found)
    shapes = sorted({each.source.shape for each in found})
    if total != spec.num_elements or (len(found) == 1 and shapes[0] != spec.shape):
        raise InputError(
            f"{spec.name!r} should have shape {list(spec.shape)}; the checkpoint has {len(found)} tensor(s) "
            f"of shape {[list(shape) for shape in shapes]} for it. config.json and the weights differ."
        )
    dtypes = {each.source.dtype for each in found}
    if len(dtypes) > 1:
        raise InputError(f"{spec.name!r} is made of tensors of several dtypes: {sorted(map(str, dtypes))}.")
    return pieces


def _converted_pieces(
    spec: TensorSpec, found: list[_Candidate], by_pattern: Mapping[str, Any]
) -> tuple[Piece, ...]:
    converter = by_pattern.get(found[0].pattern or "")
    operations = (
        [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
        if converter
        else []
    )
    from transformers.core_model_loading import dot_natural_key

    columns: dict[str, list[TensorRange]] = (
        {pattern: [] for pattern in converter.source_patterns} if converter else {}
    )
    for source, pattern in sorted(found, key=lambda each: dot_natural_key(each.source.name)):
        columns.setdefault(pattern or "", []).append(source)
    used = [column for column in columns.values() if column]
    if operations == [(_STACK, 0)] and len(used) == 1:
        ordered = used[0]
    elif operations == [(_STACK, 0), (_JOIN, 1)] and len({len(column) for column in used}) == 1:
        ordered = [source for row in zip(*used, strict=True) for source in row]
    elif operations == [(_JOIN, 0)] and all(len(column) == 1 for column in used):
        ordered = [column[0] for column in used]
    else:
        steps = ", ".join(f"{name}(dim={dim})" for name, dim in operations) or "several tensors for one"
        raise UnsupportedModel(
            f"{spec.name!r} is not laid out in the checkpoint as in the model ({steps}). Load the model with "
            "transformers and save it again to write it in the model's own layout."
        )
    pieces, start = [], 0
    for source in ordered:
        pieces.append(Piece(source=source.name, start=start))
        start += source.size_bytes // source.dtype.itemsize
    return tuple(pieces)
