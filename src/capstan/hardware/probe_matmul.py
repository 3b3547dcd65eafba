"""How fast matrices are multiplied, for each dtype that the device can multiply in."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from capstan.hardware.time_slice import TimeSlice, growing_samples, median_at_each_size

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
SMALLEST = 128
# Two factors, the product and the float32 values that a shorter dtype is made from.
BYTES_PER_ELEMENT = 4 * 4
LARGEST = {"cpu": 4096, "cuda": 16384}
# The operations grow by 8 when n doubles; twice that, because matrices that no longer fit into a cache
# may be multiplied at half the rate.
GROWTH = 16.0
CALLS = 2
# How torch and cuBLAS say that a device cannot multiply in a dtype; any other error is a fault.
UNSUPPORTED = ("not implemented", "not supported", "NOT_SUPPORTED", "ARCH_MISMATCH")
# Below this share of the float32 rate a short dtype is for storing, not for computing.
WORTH_COMPUTING = 0.5


class MatmulRates(NamedTuple):
    """Operations each second by dtype name, and what a user should know about them."""

    flops_per_s: dict[str, float]
    notes: tuple[str, ...]


def matmul_rates(
    kind: str, free_bytes: int, time_slice: TimeSlice, progress: Callable[[str], None]
) -> MatmulRates:
    """The rate of large square products of each dtype, on a device of that kind ("cpu" or "cuda").

    No more than half of `free_bytes` is used. The slice is shared equally, because a dtype without
    hardware support can be 100 times slower than the next and must not use up the others' time.
    """
    rates: dict[str, float] = {}
    missing: list[str] = []
    for dtype in DTYPES:
        progress(f"matrix products in {dtype} on {kind}")
        try:
            rates[dtype] = _rate_when_large(
                kind, dtype, _sizes(kind, free_bytes), time_slice.part(1 / len(DTYPES))
            )
        except RuntimeError as error:
            if not any(words in str(error) for words in UNSUPPORTED):
                raise
            missing.append(dtype)
    return MatmulRates(rates, (*_missing_notes(missing, kind), *_slow_notes(rates, kind)))


def _sizes(kind: str, free_bytes: int) -> list[int]:
    sizes = [SMALLEST]
    while sizes[-1] < LARGEST[kind] and BYTES_PER_ELEMENT * (2 * sizes[-1]) ** 2 <= free_bytes // 2:
        sizes.append(sizes[-1] * 2)
    return sizes


def _rate_when_large(kind: str, dtype: str, sizes: list[int], time_slice: TimeSlice) -> float:
    """A product of two n × n matrices does 2 n³ operations; the largest n that was measured counts.

    Not the best rate of all sizes: a dtype without hardware support is fastest inside a cache and ten
    times slower at the sizes that a model has.
    """
    _product_seconds(SMALLEST, kind, dtype)  # the libraries load their kernels at the first product
    samples = growing_samples(
        lambda n: _product_seconds(n, kind, dtype), sizes, time_slice, growth=GROWTH, calls=CALLS
    )
    medians = median_at_each_size(samples)
    n = max(medians)
    return 2 * n**3 / medians[n]


def _product_seconds(n: int, kind: str, dtype: str) -> float:
    """The time of one product after one that warms up, into an output that is there already."""
    import torch

    left, right = (_random_matrix(n, kind, dtype, seed) for seed in (0, 1))
    out = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=out)
        if kind == "cuda":
            torch.cuda.synchronize()

    multiply()
    return TimeSlice(0.0).seconds_of(multiply)


def _random_matrix(n: int, kind: str, dtype: str, seed: int) -> "torch.Tensor":
    """Random values, because an accelerator multiplies zeros faster than it multiplies numbers."""
    import torch

    # A generator of its own: probing must not change what the caller's random numbers will be.
    generator = torch.Generator(device=kind).manual_seed(seed)
    values = torch.randn(n, n, generator=generator, device=kind, dtype=torch.float32)
    return values.to(getattr(torch, dtype))


def _missing_notes(missing: list[str], kind: str) -> list[str]:
    return [f"Matrices of {dtype} cannot be multiplied on {kind} here." for dtype in missing]


def _slow_notes(rates: dict[str, float], kind: str) -> list[str]:
    fast = rates.get("float32", 0.0)
    return [
        f"{dtype} products run at {rate / fast:.2g} of the float32 rate on {kind}: "
        "store in it, compute in float32."
        for dtype, rate in rates.items()
        if rate < WORTH_COMPUTING * fast
    ]
