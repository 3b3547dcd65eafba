"""A few elements and where they are; all others are 0."""

import math
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from capstan.codecs.codec import Codec
from capstan.codecs.dtypes import dtype_from_name, dtype_name, num_elements, require_floating
from capstan.codecs.elements import bytes_of, reinterpret, saturating_cast
from capstan.codecs.index_sets import index_bytes, read_positions, write_positions
from capstan.codecs.stochastic import uniform
from capstan.errors import InputError, UsageError

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SEED_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class _Sparse(Codec):
    """ceil(fraction * elements) of the elements, at least one if there are any; the rest decode to 0.

    The payload is the positions, then the values in `value_dtype`, in the order of their positions.
    """

    family: ClassVar[str]

    fraction: float
    value_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"fraction must be above 0 and at most 1, found {self.fraction}.")
        if self.value_dtype not in VALUE_DTYPES:
            known = ", ".join(map(dtype_name, VALUE_DTYPES))
            raise UsageError(f"value_dtype must be one of {known}, found {self.value_dtype}.")

    @property
    def name(self) -> str:
        typed = "" if self.value_dtype == torch.float32 else f":{dtype_name(self.value_dtype)}"
        return f"{self.family}:{self.fraction!r}{typed}"

    @classmethod
    def from_name(cls, name: str) -> Self:
        pattern = rf"{cls.family}:(?P<fraction>[0-9][0-9.e-]{{0,30}})(:(?P<dtype>float32|float16|bfloat16))?"
        match = re.fullmatch(pattern, name)
        try:
            if match is None:
                raise ValueError
            fraction = float(match["fraction"])
        except ValueError:
            raise UsageError(
                f"Cannot read the codec {name!r}. Wanted {cls.family}:FRACTION[:TYPE], such as "
                f"{cls.family}:0.01 or {cls.family}:0.01:float16."
            ) from None
        return cls(fraction=fraction, value_dtype=dtype_from_name(match["dtype"] or "float32"))

    def num_kept(self, shape: tuple[int, ...]) -> int:
        """How many elements of a tensor of this shape are kept."""
        return math.ceil(self.fraction * num_elements(shape))

    def encoded_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        require_floating(self.name, dtype)
        return self._position_bytes(shape) + self.num_kept(shape) * self.value_dtype.itemsize

    def scratch_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, *, device_type: str = "cuda") -> int:
        """In proportion to the elements that are kept: positions as 64-bit numbers, bit by bit while read."""
        kept, limit = self.num_kept(shape), max(1, num_elements(shape))
        width = (limit // max(1, kept)).bit_length()
        return kept * (24 * width + 16 * len(shape) + 96) + 2 * limit + 4096

    @abstractmethod
    def _position_bytes(self, shape: tuple[int, ...]) -> int:
        """The size of the positions in the payload."""

    @abstractmethod
    def _choose(self, flat: Tensor, target: Tensor, seed: int | None) -> Tensor:
        """The positions to keep, rising; written into `target` too."""

    @abstractmethod
    def _chosen(self, payload: Tensor, numel: int) -> Tensor:
        """The positions that are written in `payload`."""

    def _write(self, values: Tensor, payload: Tensor, seed: int | None) -> None:
        if not values.numel():
            return
        flat, split = values.reshape(-1), self._position_bytes(tuple(values.shape))
        positions = self._choose(flat, payload[:split], seed)
        payload[split:] = bytes_of(saturating_cast(flat[positions], self.value_dtype))

    def _read(self, payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        out.zero_()
        if not out.numel():
            return
        split = self._position_bytes(tuple(out.shape))
        values = saturating_cast(reinterpret(payload[split:], self.value_dtype), out.dtype)
        positions = self._chosen(payload[:split], out.numel())
        if out.is_contiguous():
            out.view(-1)[positions] = values
        else:
            out[torch.unravel_index(positions, out.shape)] = values


@dataclass(frozen=True, kw_only=True)
class TopK(_Sparse):
    """The elements of largest absolute value; of equal ones, those that come first.

        |value - decoded|^2 <= (1 - kept / elements) |value|^2        (and the rounding to `value_dtype`)

    Biased: use it with `ErrorFeedback`. Positions are Elias-Fano coded: at 1 % 8.6 bits each, where 32 are
    usual. NaN raises `InputError` on the CPU and counts as the largest elsewhere.

    Source: sparsified SGD with memory, Stich et al., arXiv 1809.07599.
    """

    family = "topk"

    def _position_bytes(self, shape: tuple[int, ...]) -> int:
        return index_bytes(self.num_kept(shape), num_elements(shape))

    def _choose(self, flat: Tensor, target: Tensor, seed: int | None) -> Tensor:
        sizes = flat.abs()
        if flat.device.type == "cpu" and bool(sizes.isnan().any()):
            raise InputError("Only numbers can be ordered, found NaN. Use a cast there.")
        kept = self.num_kept(tuple(flat.shape))
        sizes = sizes.nan_to_num(nan=math.inf, posinf=math.inf)
        least = torch.topk(sizes, kept, sorted=False).values.amin()
        above = (sizes > least).nonzero().view(-1)
        equal = (sizes == least).nonzero().view(-1)
        positions = torch.cat((above, equal[: kept - above.numel()])).sort().values
        target.copy_(write_positions(positions, flat.numel()))
        return positions

    def _chosen(self, payload: Tensor, numel: int) -> Tensor:
        return read_positions(payload, self.num_kept((numel,)), numel)


@dataclass(frozen=True, kw_only=True)
class RandomK(_Sparse):
    """Elements chosen by chance: one of each of `kept` stretches of nearly equal length.

    Every element is kept about as often as any other. Values are not scaled up, so it is a contraction,
    biased, for use with `ErrorFeedback`. The positions are a function of the seed, so 8 bytes tell them all.
    """

    family = "randomk"

    def _position_bytes(self, shape: tuple[int, ...]) -> int:
        return _SEED_BYTES if num_elements(shape) else 0

    def _choose(self, flat: Tensor, target: Tensor, seed: int | None) -> Tensor:
        if seed is None:
            raise UsageError(f"{self.name} chooses by chance. Give a seed, a new one for every tensor.")
        key = seed % 2**63
        target.copy_(torch.frombuffer(bytearray(key.to_bytes(_SEED_BYTES, "little")), dtype=torch.uint8))
        return self._drawn(key, flat.numel(), flat.device)

    def _chosen(self, payload: Tensor, numel: int) -> Tensor:
        key = int.from_bytes(bytes(payload.cpu().numpy()), "little")
        return self._drawn(key, numel, payload.device)

    def _drawn(self, key: int, numel: int, device: torch.device) -> Tensor:
        kept = self.num_kept((numel,))
        edges = torch.arange(kept + 1, device=device) * numel // kept
        lengths = edges[1:] - edges[:-1]
        steps = (uniform(key, 0, kept, device).double() * lengths).long()
        return edges[:-1] + torch.minimum(steps, lengths - 1)
