"""Error feedback: what a codec has lost is added to what it encodes next."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from capstan.codecs.codec import Codec
from capstan.errors import InputError


class ErrorFeedback:
    """A codec with a memory, one residual for each key: what it encodes under one key, over and over.

        wanted   = value + residual
        payload  = encode(wanted)
        residual = wanted - decode(payload)

    The sum of all that was decoded plus the residual is the sum of all values, up to rounding. So a biased
    codec loses nothing, it delays; for that each error must be smaller than what it is made from.

    Residuals of 16-bit values are kept in float32, since what is owed is mostly less than their rounding; a
    sum beyond their range crosses as their largest number. What is not finite is not owed.

    Unlike a codec it has state: one for each sender, saved with `state_dict`, loaded with `load_state_dict`.

    Source: Karimireddy et al., arXiv 1901.09847; for worker and server side 1-bit Adam, arXiv 2102.02888.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._residuals: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode_into(self, values: Tensor, payload: Tensor, *, key: str, seed: int | None = None) -> Tensor:
        """Encode `values` (floating point, of the same shape each time for a key) plus what was lost before.

        Returns what the payload decodes to. `values` are left alone. The payload must be on their device.
        """
        residual = self._residual(key, values)
        owed_and_new = residual + values  # apart: what a codec refuses is not owed
        most = torch.finfo(values.dtype).max
        is_wider = residual.dtype != values.dtype
        wanted = owed_and_new.clamp(-most, most).to(values.dtype) if is_wider else owed_and_new
        self.codec.encode_into(wanted, payload, seed=seed)
        decoded = torch.empty_like(wanted)
        self.codec.decode_into(payload, tuple(values.shape), values.dtype, decoded)
        torch.sub(owed_and_new, decoded, out=residual).nan_to_num_(0.0, 0.0, 0.0)
        return decoded

    def rescale(self, factor: float) -> None:
        """The unit of the values changes, they will be `factor` times what they were: so is what is owed."""
        for residual in self._residuals.values():
            residual.mul_(factor).nan_to_num_(0.0, 0.0, 0.0)

    def residual(self, key: str) -> Tensor | None:
        """What is still owed under a key, or None where nothing was encoded yet."""
        return self._residuals.get(key)

    def state_dict(self) -> dict[str, Tensor]:
        """The residuals by key: a copy."""
        return {key: residual.clone() for key, residual in self._residuals.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with residuals that `state_dict` gave."""
        self._residuals = {key: residual.clone() for key, residual in state.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._residuals)

    def _residual(self, key: str, values: Tensor) -> Tensor:
        known = self._residuals.get(key)
        if known is None:
            known = self._residuals[key] = torch.zeros(
                values.shape, dtype=_residual_dtype(values.dtype), device=values.device
            )
        elif known.dtype == values.dtype:  # as a state of 16-bit residuals has it
            known = self._residuals[key] = known.to(_residual_dtype(values.dtype))
        if known.shape != values.shape or known.dtype != _residual_dtype(values.dtype):
            raise InputError(
                f"The residual of {key!r} is {known.dtype} of shape {tuple(known.shape)}, the values are "
                f"{values.dtype} of shape {tuple(values.shape)}. Use a new key, or the state of this model."
            )
        if known.device != values.device:  # after loading
            known = self._residuals[key] = known.to(values.device)
        return known


def _residual_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
