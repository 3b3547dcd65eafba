"""In how many bits activations and gradients cross between stages."""

from dataclasses import dataclass
from typing import Self

from capstan.codecs import Codec, codec_from_name
from capstan.codecs.bits import WIDTHS
from capstan.errors import UsageError
from capstan.pipelining.midrise import MidRise

GROUP_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What crosses the boundary between two stages, each way; None is full precision.

    Args:
        forward: for activations: of their changes since the sample's last visit, or of themselves.
        backward: for gradients, which are sent as they are.
        changes: send changes of activations. Off is direct quantisation, which needs no memory.

    Source: AC-SGD, arXiv 2206.01299.
    Differs: each group of 64 values has a grid of its own from its lowest to its highest value, so nothing
    is clipped and no level is lost; its two numbers are bfloat16, because changes shrink as training settles
    until float16 could not hold their scale.
    """

    forward: Codec | None = None
    backward: Codec | None = None
    changes: bool = True

    @classmethod
    def of_bits(
        cls,
        *,
        forward_bits: int | None,
        backward_bits: int | None,
        group_size: int = GROUP_SIZE,
        symmetric: bool = False,
        midrise: bool = False,
        stochastic: bool = False,
        changes: bool = True,
    ) -> Self:
        """Groups of so many bits a value each way; `symmetric` grids are exact at 0 and have one level less,
        `midrise` grids are symmetric without 0 and have all levels and one number a group less, `stochastic`
        rounding has no bias.

        Raises:
            UsageError: there is no codec of so many bits, or both grids are asked for.
        """
        if symmetric and midrise:
            raise UsageError("A grid is symmetric with a level at 0, or midrise without. Choose one.")

        def codec(way: str, num_bits: int | None) -> Codec | None:
            if num_bits is not None and midrise and num_bits in WIDTHS:
                return MidRise(num_bits=num_bits, group_size=group_size, is_stochastic=stochastic)
            return _codec(way, num_bits, group_size, symmetric, stochastic)

        return cls(
            forward=codec("forward", forward_bits), backward=codec("backward", backward_bits), changes=changes
        )

    @property
    def sends_changes(self) -> bool:
        """Whether both ends of a boundary remember what they hold."""
        return self.changes and self.forward is not None


def _codec(
    way: str, num_bits: int | None, group_size: int, symmetric: bool, stochastic: bool
) -> Codec | None:
    if num_bits is None:
        return None
    least = 2 if symmetric else 1  # of 1 bit a symmetric grid would have no level but 0
    if not least <= num_bits <= 8:
        kind = "symmetric codec" if symmetric else "codec"
        raise UsageError(
            f"There is no {kind} of {num_bits} bits for {way} messages. Choose {least} to 8 bits, or full "
            "precision."
        )
    rounding = "stochastic" if stochastic else "nearest"
    # As many bytes either way: one float32, or two bfloat16.
    numbers = "symmetric:" + rounding + ":float32" if symmetric else rounding + ":bfloat16"
    return codec_from_name(f"group{num_bits}:{group_size}:{numbers}")
