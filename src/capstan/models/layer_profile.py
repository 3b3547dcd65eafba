"""What one pass through the model takes, found out without weights.

The layers are run on the meta device, where tensors have shapes but no bytes: that gives each layer's
attention geometry, its arithmetic and the memory of its intermediate values for any model that
transformers can build, without a table of architectures.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from capstan.errors import CapstanError, UnsupportedModel
from capstan.models.attention_geometry import AttentionGeometry, geometry_of
from capstan.models.masks import MaskReader, geometry_by_mask, require_windows_of_cache
from capstan.models.meta_model import FrontOutput, LayerCall, MetaModel
from capstan.models.token_watch import TokenWatch
from capstan.storage.live_bytes import LiveBytes

# Token counts for which intermediate values are measured, large enough that constant parts do not show.
_SAMPLED_TOKENS = (256, 512)


# A number that is nothing else in a model: no head, expert or width.
_COUNTED_TOKENS = 61

# Operations around a layer's own: attention, rows, hidden states.
_OWN_OPERATIONS = 20
# What Python does around each takes about twice as long as starting it.
_PYTHON_SHARE = 3.0


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One decoder layer: its attention, and its arithmetic apart from attention."""

    geometry: AttentionGeometry
    flops_per_token: float


class ModelProfile:
    """Facts about a meta, each measured once.

    Raises:
        UnsupportedModel: a layer does not call its attention exactly once.
    """

    def __init__(self, meta: MetaModel) -> None:
        self._meta = meta
        self.itemsize = meta.compute_dtype.itemsize
        self._measured_workspace = cache(self._workspace)
        try:
            self.call_bytes_per_token = self._call_bytes_per_token()
            self.layers = self._layers()
            self._refuse_own_positions()
            self.dispatch_s = self._dispatch_s()
        except CapstanError:
            raise
        except Exception as error:  # whatever a model's own code leads to when it is run in pieces
            raise UnsupportedModel(
                f"{type(meta.model).__name__} does not run in pieces, layer by layer over packed "
                f"sequences, as this engine runs models: {type(error).__name__}: {error}"
            ) from error

    @property
    def cached_elements(self) -> tuple[int, ...]:
        """Elements of keys and values that one token leaves in each layer's cache."""
        return tuple(layer.geometry.cached_elements for layer in self.layers)

    def _layers(self) -> tuple[LayerProfile, ...]:
        meta, reader = self._meta, MaskReader()
        with meta.masks_read_by(reader.make):
            front = self._watched_front()
        layers = tuple(self._layer(index, front.calls[index], reader) for index in range(meta.num_layers))
        name = type(meta.model).__name__
        geometries = {meta.first_layer + index: layer.geometry for index, layer in enumerate(layers)}
        require_windows_of_cache(meta.model.config, geometries, meta.max_positions, name)
        return layers

    def _watched_front(self) -> FrontOutput:
        """The front's output for two tokens at the first positions."""
        meta = self._meta
        rows, numbers = self._rows(2), torch.arange(2)
        with torch.inference_mode(), _buffers_on("cpu", meta.model), TokenWatch(numbers, rows) as watch:
            front = meta.front(rows, torch.arange(2), self._rest(), numbers=numbers)
        if watch.other_use is not None:
            raise UnsupportedModel(
                f"{type(meta.model).__name__} uses token ids for more than its input embedding "
                f"({watch.other_use}), which this engine does not do."
            )
        return front

    def _front(self, num_tokens: int) -> FrontOutput:
        """The front's output on the host, from weights that are all zero and take no memory."""
        meta = self._meta
        positions = torch.zeros(num_tokens, dtype=torch.long)
        with torch.inference_mode(), _buffers_on("cpu", meta.model):
            return meta.front(self._rows(num_tokens), positions, self._rest())

    def _rows(self, num_tokens: int) -> Tensor:
        meta = self._meta
        return torch.zeros((), dtype=meta.compute_dtype).expand(num_tokens, meta.embedding_width)

    def _rest(self) -> dict[str, Tensor]:
        return {spec.name: torch.zeros((), dtype=spec.dtype).expand(spec.shape) for spec in self._meta.rest}

    def _call_bytes_per_token(self) -> int:
        """Bytes of layer arguments (rotary tables and the like) that each token keeps during a sweep."""
        few, many = (_storage_bytes(self._front(count).calls) for count in (16, 32))
        return -(-(many - few) // 16)

    def _layer(self, index: int, call: LayerCall, reader: MaskReader) -> LayerProfile:
        meta = self._meta
        seen: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = []

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            if not (getattr(module, "is_causal", True) and options.get("is_causal", True) is not False):
                raise UnsupportedModel(
                    f"{type(meta.model).__name__} lets a token see what comes next; give a decoder."
                )
            seen.append((query, key, value, options))
            return _attention_result(query, value)

        try:
            self._run_on_meta(index, call, 2, attend, kept=reader.rule)
        except CapstanError:
            raise
        except Exception:  # a mask's mark has bytes; where it is computed with, nothing may have any
            seen.clear()
            self._run_on_meta(index, call, 2, attend)
        if len(seen) != 1:
            raise UnsupportedModel(
                f"Layer {index} of {type(meta.model).__name__} calls its attention {len(seen)} times; "
                "this engine places the KV cache of layers that call it once."
            )
        query, key, value, options = seen[0]
        mask, name = options.pop("attention_mask", None), type(meta.model).__name__
        geometry = geometry_of(query, key, value, options, name)
        if mask is not None:
            rule = reader.rule(mask)
            if rule is None:
                raise UnsupportedModel(
                    f"Layer {index} of {name} makes a mask of its own for its attention, which this engine "
                    "does not do."
                )
            geometry = geometry_by_mask(geometry, rule, meta.max_positions, name)
        return LayerProfile(
            geometry=geometry,
            flops_per_token=flops_per_token(meta, index),
        )

    def _refuse_own_positions(self) -> None:
        """A layer that counts its tokens takes the place in a batch for the place in a sequence."""
        front = self._front(_COUNTED_TOKENS)
        for index in range(self._meta.num_layers):
            counting = _CountingWatch(_COUNTED_TOKENS)
            self._run_on_meta(index, front.calls[index], _COUNTED_TOKENS, _attend_on_meta, counting)
            if counting.is_seen:
                name = type(self._meta.model).__name__
                raise UnsupportedModel(
                    f"Layer {self._meta.first_layer + index} of {name} numbers its tokens by itself, as for "
                    "a scale that depends on the position; in this engine's batches, which hold several "
                    "sequences one after the other, the numbers would be wrong."
                )

    def workspace_bytes(self, num_tokens: int) -> int:
        """Peak bytes of intermediate values while any one layer runs over `num_tokens` tokens, apart from
        its input and the insides of attention. They grow with the tokens, so two measurements say all."""
        few, many = _SAMPLED_TOKENS
        if num_tokens <= many:
            return self._measured_workspace(num_tokens)
        low, high = self._measured_workspace(few), self._measured_workspace(many)
        return high + -(-(high - low) // (many - few)) * (num_tokens - many)

    def _workspace(self, num_tokens: int) -> int:
        front = self._front(num_tokens)
        peaks = {}
        for index in range(self._meta.num_layers):
            kind = _kind(self._meta, index)
            if kind not in peaks:
                live = LiveBytes()
                self._run_on_meta(index, front.calls[index], num_tokens, _attend_on_meta, live)
                peaks[kind] = live.peak_bytes
        return max(peaks.values())

    def _dispatch_s(self) -> float:
        """Seconds that Python and torch's dispatcher need for one layer, however small its tensors: so much
        for each operation, whose number is counted."""
        counter = _OperationCounter()
        self._run_on_meta(0, self._front(1).calls[0], 1, _attend_on_meta, counter)
        return (counter.count + _OWN_OPERATIONS) * _PYTHON_SHARE * _operation_s()

    def _run_on_meta(
        self,
        index: int,
        call: LayerCall,
        num_tokens: int,
        attend: Any,
        observer: AbstractContextManager[Any] | None = None,
        *,
        kept: Callable[[Tensor], Any] = lambda _: None,
    ) -> None:
        """Run a layer where tensors have no bytes. Of the call's, those that are `kept` stay as they are."""
        meta = self._meta
        meta.attend_with(attend)
        weights = {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            for spec in meta.layer_tensors(index)
        }
        hidden = torch.empty(1, num_tokens, meta.hidden_size, dtype=meta.compute_dtype, device="meta")
        call = tree_map(lambda value: value if _is_kept(value, kept) else _to_meta(value), call)
        with (
            torch.inference_mode(),
            _buffers_on("meta", meta.layers[index]),
            _experts_stand_in(meta, index),
            meta.equipped(index, weights),
            observer or nullcontext(),
        ):
            meta.layer(index, hidden, call)


class _CountingWatch(TorchDispatchMode):
    """Sees whether so many numbers are made, from 0 or any other on."""

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count, self.is_seen = count, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.arange and result.numel() == self._count:
            self.is_seen = True
        return result


class _OperationCounter(TorchDispatchMode):
    """Counts the operations of a `with` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@cache
def _operation_s() -> float:
    """Seconds that starting one small operation takes on this machine's fastest device."""
    number = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    seconds = []
    for _ in range(5):
        started_s = time.perf_counter()
        for _ in range(100):
            number.add_(1)
        seconds.append(time.perf_counter() - started_s)
    return min(seconds) / 100


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _is_kept(value: Any, kept: Callable[[Tensor], Any]) -> bool:
    return isinstance(value, Tensor) and kept(value) is not None


def _attention_result(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _attend_on_meta(_: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return _attention_result(query, value)


def _storage_bytes(calls: list[LayerCall]) -> int:
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(calls)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())


def _kind(meta: MetaModel, index: int) -> tuple[Any, ...]:
    shapes = tuple(spec.shape for spec in meta.layer_tensors(index))
    return (type(meta.layers[index]), shapes)


def flops_per_token(meta: MetaModel, index: int) -> float:
    """Arithmetic of a layer apart from attention: two operations for each weight of a matrix; of a stack of
    experts, only those that a token visits."""
    config = meta.config.get_text_config()
    visited = getattr(config, "num_experts_per_tok", None) or 1
    flops = 0.0
    for spec in meta.layer_tensors(index):
        if len(spec.shape) == 2:
            flops += 2 * spec.num_elements
        elif len(spec.shape) == 3:
            flops += 2 * spec.num_elements * min(1.0, visited / spec.shape[0])
    return flops


@contextmanager
def _buffers_on(device: str, module: nn.Module) -> Iterator[None]:
    """A module's computed buffers must be on the device of its inputs, for a while."""
    moved = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    for part, name, buffer in moved:
        part._buffers[name] = buffer.to(device)
    try:
        yield
    finally:
        for part, name, buffer in moved:
            part._buffers[name] = buffer


@contextmanager
def _experts_stand_in(meta: MetaModel, index: int) -> Iterator[None]:
    """Which expert a token visits depends on data, so experts cannot run without it. In their place stands
    what they allocate: a row for each visit, through every matrix, all kept until the result is summed."""
    stacks = [
        module
        for module in meta.layers[index].modules()
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    ]
    for module in stacks:
        module.forward = _stand_in_for(module)
    try:
        yield
    finally:
        for module in stacks:
            del module.forward


def _stand_in_for(experts: nn.Module) -> Any:
    widths = [
        width
        for parameter in experts.parameters(recurse=False)
        if parameter.dim() == 3
        for width in parameter.shape[1:]
    ]

    def forward(hidden: Tensor, chosen: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        # Some are told which expert a token visits, some are given a row for each visit.
        visits = hidden.shape[0] if chosen is None else chosen.numel()
        kept = [hidden.new_empty(visits, width) for width in (*widths, hidden.shape[-1], hidden.shape[-1])]
        return kept[0].new_empty(hidden.shape)

    return forward
