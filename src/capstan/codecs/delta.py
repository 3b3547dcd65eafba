"""Changes in few bits: what a receiver holds already is not sent again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from capstan.codecs.codec import Codec
from capstan.codecs.compressor import Compressor
from capstan.errors import InputError


class Delta:
    """One end, sender or receiver, of values that are sent again and again under a key.

        change = decode(encode(value - held));  held += change          (on both ends)

    Both ends hold the same, bit for bit and for ever, if they were given the same to start with: what one
    adds is what the other decodes. What a codec loses of a change is part of the next one, so nothing is
    lost: the error of `held` is that of the last change, and where values settle it goes to 0 with them.

    Args:
        codec: in how many bits a change crosses.
        salt: tells senders with stochastic rounding apart.

    Source: AC-SGD, arXiv 2206.01299; the replicas of DCD-PSGD, arXiv 1803.06443, are the same.
    """

    def __init__(self, codec: Codec, *, salt: int = 0) -> None:
        self._compressor = Compressor(codec, salt=salt)
        self._held: dict[str, Tensor] = {}

    def start(self, key: str, values: Tensor) -> None:
        """What both ends hold under a key from now on, such as values that were sent in full."""
        self._held[key] = values.detach().clone(memory_format=torch.contiguous_format)

    def held(self, key: str) -> Tensor:
        """What both ends hold; belongs to this end, and changes with the next message.

        Raises:
            InputError: nothing was started under this key.
        """
        if key not in self._held:
            raise InputError(
                f"Nothing is held under {key!r} yet: send it in full first, and `start` both ends."
            )
        return self._held[key]

    def forget(self, key: str) -> None:
        """Hold nothing under a key any more; both ends must do so."""
        self._held.pop(key, None)

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def size(self, values: Tensor) -> int:
        """The bytes that a change of `values` takes."""
        return self._compressor.size(values)

    @torch.no_grad()
    def encode(self, values: Tensor, payload: Tensor, *, key: str) -> Tensor:
        """Encode what has changed into `payload`, on any device; returns what both ends then hold."""
        held = self._fitting(key, values)
        self._compressor.encode(values - held, payload, key=key)
        return self.decode(payload, key=key)

    @torch.no_grad()
    def decode(self, payload: Tensor, *, key: str) -> Tensor:
        """Add a change that the other end has encoded; returns what both then hold."""
        held = self.held(key)
        change = torch.empty_like(held)
        self._compressor.decode(payload, change)
        return held.add_(change)

    def state_dict(self) -> dict[str, Any]:
        """All that is held, and how often was sent: copies."""
        return {
            "held": {key: each.clone() for key, each in self._held.items()},
            "compressor": self._compressor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._held = {key: each.clone() for key, each in state["held"].items()}
        self._compressor.load_state_dict(state["compressor"])

    def _fitting(self, key: str, values: Tensor) -> Tensor:
        held = self.held(key)
        if held.shape != values.shape or held.dtype != values.dtype:
            raise InputError(
                f"Under {key!r} both ends hold {held.dtype} of shape {tuple(held.shape)}; the values are "
                f"{values.dtype} of shape {tuple(values.shape)}. Use a new key."
            )
        if held.device != values.device:  # after loading
            held = self._held[key] = held.to(values.device)
        return held
