"""The model's structure without its weights.

transformers builds the model itself, with every parameter on the meta device and every computed buffer
(rotary frequencies, embedding scales) real. Its decoder layers are then lifted out and replaced by *taps*,
so that the model's own forward can be run in three pieces, each unmodified:

    front   everything before the first layer: tokens in, hidden states and each layer's arguments out
    layers  one by one, in whatever order the block schedule asks for, given their weights as they arrive
    back    everything after the last layer: hidden states in, logits out

Sequences are *packed*: a batch is one row `[1, tokens, hidden]` that holds the tokens of many sequences one
after the other, with their positions. All of a decoder but attention works token by token, so nothing is
padded; attention is the caller's (`attend_with`), who knows where each sequence lies.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from capstan.errors import UnsupportedModel
from capstan.models.attention_geometry import attend_through_module
from capstan.models.on_meta import build_on_meta

ATTENTION_NAME = "capstan"
_READING_NAME = "capstan masks"  # while masks are read
Weights = Mapping[str, Tensor]


class LayerCall(NamedTuple):
    """The arguments with which the model's forward called one of its layers, hidden states apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class FrontOutput(NamedTuple):
    """What the front hands to the layers: hidden states `[1, tokens, hidden]`, and a call for each layer."""

    hidden: Tensor
    calls: list[LayerCall]


@dataclass
class _Order:
    """What all taps are told."""

    calls: list[tuple[Tensor, LayerCall]] | None = None
    returns: Tensor | None = None


class _Tap(nn.Module):
    """Stands where a decoder layer was: notes the call, returns what it was told to."""

    def __init__(self, order: _Order) -> None:
        super().__init__()
        self._order = order

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        order = self._order
        if order.calls is not None:
            order.calls.append((hidden, LayerCall(args, kwargs)))
        return hidden if order.returns is None else order.returns


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that the model wants: name in its state dict, shape, and the dtype it computes in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()


class ParameterSlot(NamedTuple):
    """Where a module looks a weight up: `holder[key]` of one of its parts."""

    name: str
    holder: dict[str, Any]
    key: str


class MetaModel:
    """A decoder-only model in pieces.

    `table` is the input embedding, `head` the output matrix (the same tensor where they are tied),
    `layer_tensors[i]` what layer i needs, `rest` everything else (positions, final norm, projections).
    """

    def __init__(self, model: Any, config: Any) -> None:
        from transformers import conversion_mapping  # here and below: importing what builds models takes long

        self.config = config
        self.model = model
        self.conversions = list(conversion_mapping.get_model_conversion_mapping(model))
        self.state = {
            name: TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
            for name, tensor in model.state_dict().items()
        }
        path, layers = _decoder_layers(model, config)
        self.layers_path = path
        self.layers: list[nn.Module] = list(layers)
        self._layer_prefixes = [f"{path}.{index}." for index in range(len(self.layers))]
        self._slots = [
            list(parameter_slots(layer, prefix))
            for layer, prefix in zip(self.layers, self._layer_prefixes, strict=True)
        ]
        self._blanks = {name: holder[key] for slots in self._slots for name, holder, key in slots}
        self._order = _Order()
        self.put_layers(_Tap(self._order) for _ in self.layers)
        self.table = _name_of(model, model.get_input_embeddings(), "input embedding")
        head = _name_of(model, model.get_output_embeddings(), "output embedding")
        self.is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self.head = self.table if self.is_tied else head
        self.head_parameter = head
        self._attend: Any = None
        self._run = slice(None)  # of the model's layers, those that are here
        self.embedding_width = int(self.state[self.table].shape[1])

    def untie(self) -> None:
        """The output matrix is one of its own, whatever the config says."""
        self.is_tied, self.head = False, self.head_parameter

    def put_layers(self, modules: Iterable[nn.Module]) -> None:
        """Put one module in the place of each layer of the model that transformers has built."""
        parent, _, name = self.layers_path.rpartition(".")
        self.model.get_submodule(parent).add_module(name, nn.ModuleList(modules))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocabulary_size(self) -> int:
        return int(self.state[self.head_parameter].shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of hidden states."""
        return self.state[self.table].dtype

    def part(self, first: int, end: int) -> "MetaModel":
        """The same model with its layers from `first` up to, not including, `end` only. The two share their
        modules: only one of them can compute."""
        _ = self.rest  # found out while all layers are known
        part = copy(self)
        part._run = slice(first, end)
        part.layers = self.layers[first:end]
        part._layer_prefixes = self._layer_prefixes[first:end]
        part._slots = self._slots[first:end]
        part._attend = None
        return part

    @property
    def first_layer(self) -> int:
        """The number in the whole model of this part's first layer."""
        return int(self._run.start or 0)

    def layer_tensors(self, index: int) -> list[TensorSpec]:
        """What layer `index` needs, by full name."""
        prefix = self._layer_prefixes[index]
        return [spec for name, spec in self.state.items() if name.startswith(prefix)]

    def slots(self) -> Iterator[ParameterSlot]:
        """Every slot of the layers, and of what is around them."""
        yield from (slot for slots in self._slots for slot in slots)
        yield from parameter_slots(self.model, "")

    @cached_property
    def rest(self) -> list[TensorSpec]:
        """What belongs to no layer and is neither table nor head."""
        prefixes = tuple(self._layer_prefixes)
        apart = {self.table, self.head, self.head_parameter}
        return [
            spec for name, spec in self.state.items() if not name.startswith(prefixes) and name not in apart
        ]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model's positions allow, or None where it states no limit."""
        config = self.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):
            # These stretch their frequencies by the longest sequence of a batch, which would make one
            # sequence's result depend on its neighbours. Up to the original length they do not.
            longest = rope.get("original_max_position_embeddings") or longest
        return int(longest) if longest else None

    def to(self, device: torch.device) -> None:
        """Move the computed buffers to `device`; the weights stay where they are."""
        for module in [self.model, *self.layers]:
            for part in module.modules():
                for name, buffer in list(part._buffers.items()):
                    if buffer is not None and not buffer.is_meta:
                        part._buffers[name] = buffer.to(device)

    @cached_property
    def _base(self) -> tuple[Any, str]:
        """The model without its head, and what the names of its tensors begin with."""
        if self.model.base_model is not self.model:
            return self.model.base_model, f"{self.model.base_model_prefix}."
        path = self.layers_path.rpartition(".")[0]  # Llama 4 names a base that only its larger models have
        return self.model.get_submodule(path), f"{path}." if path else ""

    def front(
        self, rows: Tensor, positions: Tensor, rest: Weights, *, numbers: Tensor | None = None
    ) -> FrontOutput:
        """Run everything before the first layer.

        rows: the table's rows of the tokens, `[tokens, width]`; positions: `[tokens]`; numbers: those of the
        rows, `[tokens]`, where the caller watches what becomes of them.
        """
        # Row i of the gathered table is token i.
        tokens = torch.arange(rows.shape[0], device=rows.device) if numbers is None else numbers
        calls: list[tuple[Tensor, LayerCall]] = []
        base, prefix = self._base
        weights = {name: tensor for name, tensor in rest.items() if name.startswith(prefix)} | {
            self.table: rows
        }
        local = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        with self._taps_set(calls=calls, returns=None):
            functional_call(
                base,
                local,
                kwargs={"input_ids": tokens[None], "position_ids": positions[None], "use_cache": False},
            )
        return FrontOutput(calls[0][0], [call for _, call in calls[self._run]])

    @contextmanager
    def equipped(self, index: int, weights: Weights) -> Iterator[None]:
        """Layer `index` has these weights inside the `with` block, by full name."""
        self.equip(index, weights)
        try:
            yield
        finally:
            self.strip(index)

    def equip(self, index: int, weights: Weights) -> None:
        """Give layer `index` its weights, until `strip`."""
        for name, holder, key in self._slots[index]:
            holder[key] = weights[name]

    def strip(self, index: int) -> None:
        """Take the weights away again: their memory has other uses."""
        for name, holder, key in self._slots[index]:
            holder[key] = self._blanks[name]

    def layer(self, index: int, hidden: Tensor, call: LayerCall) -> Tensor:
        """Run layer `index`, which must be equipped, over `hidden` `[1, tokens, hidden]`; attention goes to
        `attend_with`'s hook."""
        output = self.layers[index](hidden, *call.args, **call.kwargs)
        hidden_after: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_after

    def back(self, hidden: Tensor, rest: Weights, head: Tensor) -> Tensor:
        """Run everything after the last layer: `[1, tokens, hidden]` to logits `[tokens, vocabulary]`."""
        width = self.embedding_width
        embeddings = hidden.new_zeros(1, hidden.shape[1], width)
        positions = torch.zeros(1, hidden.shape[1], dtype=torch.long, device=hidden.device)
        weights = {**rest, self.head_parameter: head}
        if self.is_tied:
            weights[self.table] = head
        with self._taps_set(calls=None, returns=hidden):
            output = functional_call(
                self.model,
                weights,
                kwargs={"inputs_embeds": embeddings, "position_ids": positions, "use_cache": False},
                tie_weights=False,
            )
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def masks_read_by(self, make: Any) -> Iterator[None]:
        """Masks that the model's forward asks for inside are made by `make`; outside there are none."""
        from transformers import AttentionMaskInterface

        config = self.model.config
        AttentionMaskInterface.register(_READING_NAME, make)
        config._attn_implementation = _READING_NAME
        try:
            yield
        finally:
            config._attn_implementation = ATTENTION_NAME
            AttentionMaskInterface.register(_READING_NAME, None)

    def attend_with(self, attend: Any) -> None:
        """Send every layer's attention to `attend(module, query, key, value, **options)`."""
        if attend == self._attend:
            return
        self._attend = attend
        for layer in self.layers:
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.capstan_attend = attend

    @contextmanager
    def _taps_set(
        self, *, calls: list[tuple[Tensor, LayerCall]] | None, returns: Tensor | None
    ) -> Iterator[None]:
        self._order.calls, self._order.returns = calls, returns
        try:
            yield
        finally:
            self._order.calls, self._order.returns = None, None


def open_meta_model(folder: Path, dtype: torch.dtype | None) -> MetaModel:
    """Build the meta model of the model in `folder` (Hugging Face format), its attention left to the caller.

    Args:
        dtype: what the model computes in; None keeps the checkpoint's own.

    Raises:
        InputError: no readable config.json.
        UnsupportedModel: not a decoder-only model whose attention goes through transformers' interface.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attend_through_module)
    model, config = build_on_meta(folder, dtype, attention=ATTENTION_NAME)
    if not type(model)._supports_attention_backend:
        raise UnsupportedModel(
            f"The attention of {type(model).__name__} does not go through transformers' attention interface, "
            "so its KV cache cannot be placed. Models in the style of Llama, Qwen, Mistral, Gemma, OPT and "
            "GPT-2 can."
        )
    # Only gradients know a padding row, and the rows gathered for a batch may be fewer than its index.
    model.get_input_embeddings().padding_idx = None
    # It would look for the padding token among numbers of rows, and warn.
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None
    model.eval()
    model.requires_grad_(False)
    return MetaModel(model, config)


def _decoder_layers(model: Any, config: Any) -> tuple[str, nn.ModuleList]:
    wanted = config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return path, module
    raise UnsupportedModel(f"{type(model).__name__} has no list of {wanted} decoder layers to place.")


def parameter_slots(module: nn.Module, prefix: str) -> Iterator[ParameterSlot]:
    """Every slot of a module and its parts whose tensor is in the state dict, by `prefix` and that name."""
    wanted = set(module.state_dict())
    for path, part in module.named_modules():
        for holder in (part._parameters, part._buffers):
            for key in holder:
                name = f"{path}.{key}" if path else key
                if name in wanted:
                    yield ParameterSlot(prefix + name, holder, key)


def _name_of(model: Any, module: nn.Module | None, role: str) -> str:
    for path, part in model.named_modules():
        if part is module and module is not None:
            return f"{path}.weight"
    raise UnsupportedModel(f"{type(model).__name__} has no {role}; a causal language model has one.")
