"""One stage of a causal language model: transformers' own forward, with most of its layers elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capstan.errors import InputError
from capstan.models.meta_model import MetaModel, parameter_slots
from capstan.models.seams import Ends, zeros


@dataclass(frozen=True, kw_only=True)
class StageCut:
    """Stage `index` of `num_stages`: the layers from `first` up to, not including, `end`.

    The first stage also holds the input embedding and the last one the output matrix, `tensors` all their
    names in the model's state; `num_parameters` are their elements, `stored_bytes` what is read of the
    checkpoint, `flops_per_token` the arithmetic of forward apart from attention. Of a tied model, `table` is
    the first stage's name of the embedding, and `table_copy` the last one's of the output matrix, its equal.
    Of every model, `table_shape` is (token ids, width) of the embedding, `hidden_size` the width of what
    passes between stages, and `max_positions` how many tokens a sample may have, None for any number.
    """

    index: int
    num_stages: int
    first: int
    end: int
    tensors: tuple[str, ...]
    num_parameters: int
    stored_bytes: int
    flops_per_token: float
    table: str | None
    table_copy: str | None
    table_shape: tuple[int, int]
    hidden_size: int
    max_positions: int | None

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


@dataclass
class _Crossing:
    """The hidden states that a stage was given, and those that it gives on."""

    incoming: Tensor | None = None
    outgoing: Tensor | None = None


@dataclass
class _Entrance:
    """Before the first layer that is here: its hidden states are those that came in."""

    crossing: _Crossing

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self.crossing.incoming is None else (self.crossing.incoming, *args[1:])


class _Elsewhere(nn.Module):
    """Stands where a layer of another stage was."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class _Exit(nn.Module):
    """Stands where the next stage's first layer was, and keeps what that is given."""

    def __init__(self, crossing: _Crossing) -> None:
        super().__init__()
        self._crossing = crossing

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self._crossing.outgoing = hidden
        return hidden.detach()  # what follows is done in vain, and needs no gradients


class Stage(nn.Module):
    """Consecutive layers of a model; `load_stage` makes it.

    It takes token ids `[samples, tokens]` in the first stage and hidden states `[samples, tokens, hidden]` in
    others, and gives hidden states, in the last stage logits `[samples, tokens, vocabulary]`. Positions,
    rotary tables and causal masks are made in every stage, by transformers' own code. All tokens are seen as
    such: pad on the right, where causal attention does not look, and leave padding out of the loss.

    Of a tied model, `tied_weight` is the embedding in the first stage and its copy in the last; they stay
    equal if every step gives both the sum of both gradients. Elsewhere it is None.

    Raises, when called:
        InputError: values of another shape, or more tokens than the model has positions for.
    """

    def __init__(self, meta: MetaModel, cut: StageCut, ends: Ends, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.cut = cut
        self._crossing = _Crossing()
        meta.put_layers(self._in_place(meta, index) for index in range(meta.num_layers))
        self.model = meta.model
        _fill(meta, ends, weights)
        self._max_positions = meta.max_positions
        self._embedding = (meta.embedding_width, meta.compute_dtype)
        self.hidden_size, self.vocabulary_size = meta.hidden_size, meta.vocabulary_size
        self.requires_grad_(True)
        self.train()

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """This stage's copy of a tied model's embedding, if it has one and another stage has the other."""
        name = (self.cut.table or self.cut.table_copy) if self.cut.num_stages > 1 else None
        return self.model.get_parameter(name) if name else None

    def _in_place(self, meta: MetaModel, index: int) -> nn.Module:
        if index == self.cut.end:
            return _Exit(self._crossing)
        if not self.cut.first <= index < self.cut.end:
            return _Elsewhere()
        if index == self.cut.first:
            meta.layers[index].register_forward_pre_hook(_Entrance(self._crossing))
        return meta.layers[index]

    def forward(self, values: Tensor) -> Tensor:
        self._check(values)
        if self.cut.is_first:
            inputs = {"input_ids": values}
        else:
            # What the front makes of it is replaced; only its shape is of use.
            width, dtype = self._embedding
            nothing = torch.zeros((), dtype=dtype, device=values.device)
            inputs = {"inputs_embeds": nothing.expand(*values.shape[:2], width)}
            self._crossing.incoming = values
        try:
            if self.cut.is_last:
                logits: Tensor = self.model(**inputs, use_cache=False).logits
                return logits
            self.model.base_model(**inputs, use_cache=False)
            hidden = self._crossing.outgoing
            assert hidden is not None
            return hidden
        finally:
            self._crossing.incoming = self._crossing.outgoing = None

    def _check(self, values: Tensor) -> None:
        if self.cut.is_first:
            is_right = values.dim() == 2 and values.dtype in (torch.int64, torch.int32)
            wanted = "token ids [samples, tokens]"
        else:
            is_right = (
                values.dim() == 3 and values.shape[2] == self.hidden_size and values.is_floating_point()
            )
            wanted = f"hidden states [samples, tokens, {self.hidden_size}]"
        if not is_right:
            raise InputError(
                f"The stage takes {wanted}, found {values.dtype} of shape {list(values.shape)}. "
                "Give it what the stage before gives."
            )
        if self._max_positions is not None and values.shape[1] > self._max_positions:
            raise InputError(
                f"The model has positions for {self._max_positions} tokens, found {values.shape[1]}. "
                "Give shorter samples."
            )

    def tensors(self) -> dict[str, Tensor]:
        """This stage's weights by the names that they have in the whole model's state."""
        return dict(self.model.state_dict())


def _fill(meta: MetaModel, ends: Ends, weights: Mapping[str, Tensor]) -> None:
    """Give the model its stage's weights. Of the others those that its forward passes on its way are zeros
    without memory, and the rest, both ends' matrices of the vocabulary, are not there."""
    passed = (ends.front | ends.back) - {meta.table, meta.head_parameter}
    for name, holder, key in list(parameter_slots(meta.model, "")):
        if name in weights:
            holder[key] = weights[name]
        elif name in passed:
            module = meta.model.get_submodule(name.rpartition(".")[0])
            del holder[key]
            module.register_buffer(key, zeros(meta.state[name]), persistent=False)
        else:
            holder[key] = None
