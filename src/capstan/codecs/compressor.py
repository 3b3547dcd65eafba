"""How one sender encodes: a codec, and where it is wanted the memory of what was lost."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from capstan.codecs.codec import Codec
from capstan.codecs.error_feedback import ErrorFeedback
from capstan.codecs.identity import Identity


class Compressor:
    """A codec, error feedback or none, and seeds that never repeat; one for each algorithm and rank.

    A key names what is encoded again and again, such as a bucket's chunk: residuals and seeds go by it.
    """

    def __init__(self, codec: Codec, *, error_feedback: bool = False, salt: int = 0) -> None:
        self.codec = codec
        self.feedback = ErrorFeedback(codec) if error_feedback else None
        self._salt = salt
        self._counts: dict[str, int] = {}

    @property
    def is_exact(self) -> bool:
        """Whether values come back as they were."""
        return isinstance(self.codec, Identity)

    def size(self, values: Tensor) -> int:
        """The bytes that `values` take."""
        return self.codec.encoded_bytes(tuple(values.shape), values.dtype)

    def encode(self, values: Tensor, payload: Tensor, *, key: str) -> None:
        """Encode into memory on any device."""
        target = (
            payload
            if payload.device == values.device
            else payload.new_empty(payload.shape, device=values.device)
        )
        if self.feedback is None or self.is_exact:
            self.codec.encode_into(values, target, seed=self._seed(key))
        else:
            self.feedback.encode_into(values, target, key=key, seed=self._seed(key))
        if target is not payload:
            payload.copy_(target)

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """Decode into `out`, from memory on any device."""
        source = payload if payload.device == out.device else payload.to(out.device)
        self.codec.decode_into(source, tuple(out.shape), out.dtype, out)

    def round_trip(self, values: Tensor, *, key: str) -> Tensor:
        """What `values` are once sent: for what a rank keeps for itself."""
        if self.is_exact:
            return values
        payload = torch.empty(self.size(values), dtype=torch.uint8, device=values.device)
        self.encode(values, payload, key=key)
        decoded = torch.empty_like(values)
        self.decode(payload, decoded)
        return decoded

    def rescale(self, factor: float) -> None:
        """What is encoded from now on is in another unit: `factor` times what it was."""
        if self.feedback is not None:
            self.feedback.rescale(factor)

    def state_dict(self) -> dict[str, Any]:
        """Residuals and counts."""
        return {
            "counts": dict(self._counts),
            "residuals": {} if self.feedback is None else self.feedback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._counts = dict(state["counts"])
        if self.feedback is not None:
            self.feedback.load_state_dict(state["residuals"])

    def _seed(self, key: str) -> int:
        count = self._counts[key] = self._counts.get(key, -1) + 1
        return (zlib.crc32(key.encode()) << 31) + (self._salt << 24) + count
