"""Whether a model can be cut between its layers, and which weights lie before and after them.

The model's own forward is run once over a few tokens, without weights and with layers that do nothing, while
every tensor is followed (`Origins`). A cut is right if hidden states are all that passes from layer to layer:
what else a layer is given may depend on shapes and positions, which every stage knows, and not on tokens,
weights or other layers, which it does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from capstan.errors import CapstanError, UnsupportedModel
from capstan.models.meta_model import MetaModel, TensorSpec, parameter_slots
from capstan.models.origins import Origins

_TOKENS = "token ids"
_ROWS, _COLUMNS = 2, 3  # of the tokens


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What the model has in its state beside layers, by name: weights that are used before the first and
    after the last layer, and computed values, which every stage needs."""

    front: frozenset[str]
    back: frozenset[str]
    everywhere: frozenset[str]


class _Observer(nn.Module):
    """Stands where layer `index` was, and looks at what it is given."""

    def __init__(self, index: int, called: list[Tensor], origins: Origins, name: str) -> None:
        super().__init__()
        self._index, self._called, self._origins, self._name = index, called, origins, name

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(self._called) != self._index:
            raise UnsupportedModel(f"{self._name} does not run each of its layers once, in their order.")
        first = self._called[0] if self._called else hidden
        if hidden.shape != first.shape:
            raise UnsupportedModel(
                f"The layers of {self._name} do not give hidden states alone, of the shape they were given."
            )
        if self._index and self._origins.of(hidden) - {f"layer {self._index - 1}"}:
            raise UnsupportedModel(
                f"Layer {self._index} of {self._name} is given more than what layer {self._index - 1} gave: "
                f"{_listed(self._origins.of(hidden) - {f'layer {self._index - 1}'})}."
            )
        for argument in (*args, *kwargs.values()):
            self._check(argument)
        self._called.append(hidden)
        return self._origins.name(torch.zeros_like(hidden), f"layer {self._index}")

    def _check(self, argument: Any) -> None:
        if isinstance(argument, tuple):
            for each in argument:
                self._check(each)
        elif isinstance(argument, Tensor):
            if found := self._origins.of(argument):
                raise UnsupportedModel(
                    f"Layer {self._index} of {self._name} is given, beside hidden states, what depends on "
                    f"{_listed(found)}; between stages only hidden states pass."
                )
        elif not isinstance(argument, int | float | str | None):
            raise UnsupportedModel(
                f"Layer {self._index} of {self._name} is given a {type(argument).__name__}, in which layers "
                "may leave something for each other; between stages only hidden states pass."
            )


def find_ends(meta: MetaModel) -> Ends:
    """Run the model once without its layers.

    Raises:
        UnsupportedModel: something other than hidden states passes from layer to layer.
    """
    try:
        return _find_ends(meta)
    except CapstanError:
        raise
    except Exception as error:  # whatever a model's own code leads to where there are no layers
        raise UnsupportedModel(
            f"{type(meta.model).__name__} does not run without its layers, so that it cannot be cut between "
            f"them: {type(error).__name__}: {error}"
        ) from error


def _find_ends(meta: MetaModel) -> Ends:
    model, name, origins = meta.model, type(meta.model).__name__, Origins()
    prefix = f"{model.base_model_prefix}."
    slots = parameter_slots(model, "")
    buffers = {each.name for each in slots if not isinstance(each.holder[each.key], nn.Parameter)}
    state = [meta.state[meta.table], *meta.rest]
    inside = {each.name: zeros(each) for each in state if each.name.startswith(prefix)}
    weights = {name: origins.name(inside[name], name) for name in inside.keys() - buffers}
    called: list[Tensor] = []
    observers = nn.ModuleList(_Observer(index, called, origins, name) for index in range(meta.num_layers))
    meta.put_layers(observers)
    with torch.no_grad(), origins:
        tokens = origins.name(torch.zeros(_ROWS, _COLUMNS, dtype=torch.long), _TOKENS)
        after = _hidden_after(model.base_model, prefix, inside, tokens)
    if len(called) != meta.num_layers:
        raise UnsupportedModel(f"{name} runs {len(called)} of its {meta.num_layers} layers.")
    front, back = origins.of(called[0]) - {_TOKENS}, origins.of(after) - {f"layer {len(called) - 1}"}
    _check_ends(name, origins, front, back)
    if after.shape[:2] != (_ROWS, _COLUMNS):
        raise UnsupportedModel(f"The layers of {name} do not give hidden states alone.")
    unused = weights.keys() - front - back  # trained by nobody, but in the checkpoint
    outside = {each.name for each in meta.rest} - inside.keys() - buffers
    everywhere = frozenset(each.name for each in meta.rest if each.name in buffers)
    return Ends(front=front | unused, back=back | outside | {meta.head_parameter}, everywhere=everywhere)


def zeros(spec: TensorSpec) -> Tensor:
    """As many zeros as a tensor has elements, in the memory of one."""
    return torch.zeros((), dtype=spec.dtype).expand(spec.shape)


def _check_ends(name: str, origins: Origins, front: frozenset[str], back: frozenset[str]) -> None:
    earlier = {each for each in back if each == _TOKENS or each.startswith("layer ")}
    if earlier:
        raise UnsupportedModel(
            f"{name} uses {_listed(frozenset(earlier))} after its last layer; between stages only hidden "
            "states pass."
        )
    if front & back:
        raise UnsupportedModel(f"{name} uses {_listed(front & back)} before and after its layers.")
    if origins.decided:
        raise UnsupportedModel(
            f"What {name} computes is decided by values of {_listed(origins.decided)}, which not every stage "
            "knows."
        )


def _hidden_after(base: Any, prefix: str, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    local = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    output = functional_call(base, local, kwargs={"input_ids": tokens, "use_cache": False})
    hidden: Tensor = output[0]
    return hidden


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
