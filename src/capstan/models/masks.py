"""What each layer's tokens may see, read from the masks that the model's own forward makes.

Attention here is given a geometry instead of a mask, so the two must say the same. While a model is opened,
transformers hands over the rule of each mask; the model carries a mark about in the mask's place, by which
the layer that uses it is known. A rule is a function of two positions, so it is compared on positions beyond
every window without making a mask as large as that.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from capstan.errors import UnsupportedModel
from capstan.models.attention_geometry import AttentionGeometry

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Positions that are compared where a model states no longest sequence.
_LONGEST = 1 << 20


class MaskReader:
    """Makes marks in place of masks and remembers the rule of each."""

    def __init__(self) -> None:
        self._marks: dict[int, tuple[Tensor, Rule]] = {}

    def make(
        self, batch_size: int, q_length: int, kv_length: int, *_: Any, mask_function: Rule, **__: Any
    ) -> Tensor:
        """As transformers calls what makes its masks."""
        mark = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)
        self._marks[mark.untyped_storage().data_ptr()] = (mark, mask_function)
        return mark

    def rule(self, mask: Tensor) -> Rule | None:
        """The rule that a mark, or a part of it, stands for; None for what is no mark."""
        known = None if mask.is_meta else self._marks.get(mask.untyped_storage().data_ptr())
        return known[1] if known is not None else None


def geometry_by_mask(
    geometry: AttentionGeometry, rule: Rule, longest: int | None, name: str
) -> AttentionGeometry:
    """The geometry, with the window that the mask's rule has; the mask decides, as in transformers.

    Raises:
        UnsupportedModel: the rule is not that of causal attention, over all positions or a window.
    """
    longest = longest or _LONGEST
    for window in (geometry.sliding_window, _window_of(rule, longest)):
        positions = _telling_positions(longest, window)
        if torch.equal(_visible(rule, positions), _causal(positions, window)):
            return replace(geometry, sliding_window=window)
    raise UnsupportedModel(
        f"{name} hides other positions from its tokens than causal attention over a window does, as "
        "attention in chunks or in both directions; this engine would answer otherwise than the model."
    )


def require_windows_of_cache(
    config: Any, geometries: Mapping[int, AttentionGeometry], longest: int | None, name: str
) -> None:
    """Refuse models whose masks show what their cache in transformers forgets while it generates.

    `geometries` are those of some layers, by their numbers in the model; `longest` is its longest sequence.

    Raises:
        UnsupportedModel: a layer's cache keeps a window that its mask does not have.
    """
    from transformers import DynamicCache

    kept = [
        getattr(layer, "sliding_window", None)
        for layer in DynamicCache(config=config.get_text_config(decoder=True)).layers
    ]
    for index, geometry in geometries.items():
        window = kept[index] if index < len(kept) else None
        if window is None or (longest is not None and window >= longest):
            continue
        if geometry.sliding_window is None or geometry.sliding_window > window:
            raise UnsupportedModel(
                f"Layer {index} of {name} shows its tokens all positions, but generates from a cache of the "
                f"last {window}: what is right depends on how it is asked. Remove sliding_window from its "
                "config.json to generate from all positions."
            )


def _window_of(rule: Rule, longest: int) -> int | None:
    """How many positions the last one sees, its own included, if those are the last ones; None for all."""
    last = torch.tensor([longest - 1])
    hidden, seen = -1, longest - 1  # the last position hidden from it, the first one seen
    while seen - hidden > 1:
        middle = (hidden + seen) // 2
        if bool(_see(rule, last, torch.tensor([middle]))):
            seen = middle
        else:
            hidden = middle
    return longest - seen if seen else None


def _telling_positions(longest: int, window: int | None) -> Tensor:
    """Positions at which masks differ if they differ at all: around powers of two and around the window."""
    around = [1 << power for power in range(longest.bit_length())] + [longest]
    if window is not None:
        around += [window, 2 * window, 3 * window, longest - window]
    near = {place + step for place in around for step in range(-2, 3)} | set(range(min(longest, 24)))
    return torch.tensor(sorted(place for place in near if 0 <= place < longest))


def _causal(positions: Tensor, window: int | None) -> Tensor:
    distance = positions[:, None] - positions[None]
    return (distance >= 0) & (distance < (window or len(positions) + int(positions[-1])))


def _visible(rule: Rule, positions: Tensor) -> Tensor:
    return _see(rule, positions[:, None], positions[None])


def _see(rule: Rule, queries: Tensor, keys: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.long)
    shape = torch.broadcast_shapes(queries.shape, keys.shape)
    return rule(zero, zero, queries, keys).expand(shape)
