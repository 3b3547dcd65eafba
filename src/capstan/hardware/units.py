"""Quantities as text for people: GiB for memory, decimal GB/s for rates, TFLOP/s for arithmetic."""

GIB = 2**30


def gib(size_bytes: float) -> str:
    """A size in binary gibibytes, as memory is sold: `gib(2**30) == '1.00 GiB'`."""
    return f"{size_bytes / GIB:.2f} GiB"


def gb_per_s(bytes_per_s: float) -> str:
    """A rate in decimal gigabytes each second, as links are sold: 1e9 bytes/s is `1.00 GB/s`."""
    value = bytes_per_s / 1e9
    return f"{value:.2f} GB/s" if value >= 0.1 else f"{bytes_per_s / 1e6:.3g} MB/s"


def tflop_per_s(flops_per_s: float) -> str:
    """An arithmetic rate; a multiplication and its addition count as two operations."""
    value = flops_per_s / 1e12
    return f"{value:.2f} TFLOP/s" if value >= 0.1 else f"{flops_per_s / 1e9:.3g} GFLOP/s"


def short_time(seconds: float) -> str:
    """A duration in the unit that keeps it readable, from nanoseconds to seconds."""
    if not seconds:
        return "0 s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
