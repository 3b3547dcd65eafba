"""Group quantisation on the device found, by its kernels and by the torch path.

    python benchmarks/codecs/groups.py --elements 268435456 --dtype float16

Question: do encoding and decoding run near the speed of the device's memory?
"""

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch

from capstan.codecs import codec_from_name, groups

NAMES = ("group4:64", "group4:64:symmetric", "group8:64", "group8:64:symmetric")


def seconds_of(work: Callable[[], object], device: str, repeats: int) -> float:
    """The mean time of `work`, after one run that compiles; queued, so that no launch is waited for."""
    work()
    _wait(device)
    start_s = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait(device)
    return (time.perf_counter() - start_s) / repeats


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=None, help="a multiple of 4096")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.cuda.get_device_name() if device == "cuda" else "processor")
    elements = options.elements or (2**28 if device == "cuda" else 2**22)
    values = torch.randn(elements // 4096, 4096, device=device, dtype=getattr(torch, options.dtype))
    gigabytes = values.nbytes / 1e9
    print(f"{gigabytes:.2f} GB of {options.dtype}; GB/s of it, then with the payload's bytes")
    for name in NAMES:
        codec = codec_from_name(name)
        packet = codec.encode(values)
        out = torch.empty_like(values)
        both = (values.nbytes + packet.payload.nbytes) / values.nbytes
        works = {
            "encode": lambda codec=codec, packet=packet: codec.encode(values, out=packet.payload),
            "decode": lambda codec=codec, packet=packet, out=out: codec.decode(packet, out=out),
        }
        for verb, work in works.items():
            found = gigabytes / seconds_of(work, device, options.repeats)
            with mock.patch.object(groups, "_kernels", return_value=None):
                by_torch = gigabytes / seconds_of(work, device, options.repeats)
            kernels = f"{found:8.1f} {found * both:8.1f}" if groups._kernels(values.device) else " " * 17
            print(f"{name:22}{verb:8} kernels {kernels}   torch {by_torch:8.1f} {by_torch * both:8.1f}")


if __name__ == "__main__":
    main()
