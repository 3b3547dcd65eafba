"""Does any message crash the reader, or make it allocate more than its bytes are worth?

    python benchmarks/federation/fuzz.py --minutes 10

Real packets of every index code and value type are cut, grown, mixed and overwritten, mostly with a right
checksum, as an attacker would send them. Only InputError may come; memory, as tracemalloc sees it, stays
below 1 KiB for each byte of the message and 64 KiB. (A bitmap's byte stands for eight positions of eight
bytes, and a few arrays of these are alive at once.)
"""

import argparse
import struct
import time
import tracemalloc
import zlib

import numpy as np

from capstan.errors import InputError
from capstan.federation.index_codes import INDEX_CODES
from capstan.federation.packets import FRAMING_BYTES, CutPacket, read_packet, write_packet
from capstan.federation.value_codes import VALUE_TYPES

ROWS, WIDTH = 6, 80


def seeds(rng: np.random.Generator) -> list[bytes]:
    """A packet of every code and type, at several densities."""
    made = []
    for index in ("dense", "support", *INDEX_CODES):
        for value_type in VALUE_TYPES:
            for kept in (0, 1, 5, WIDTH):
                rows = np.argsort(rng.random((ROWS, WIDTH)))[:, :kept]
                flat = np.sort(rows + np.arange(ROWS)[:, None] * WIDTH, axis=None)
                count = ROWS * WIDTH if index == "dense" else len(flat)
                is_indexed = index not in ("dense", "support")
                packet = CutPacket(
                    device=1,
                    step=2,
                    rows=ROWS,
                    width=WIDTH,
                    index=index,
                    value_type=value_type,
                    values=rng.integers(0, 99, count),
                    positions=flat if is_indexed else None,
                    is_even=is_indexed and kept > 0,
                )
                made.append(write_packet(packet)[0])
    return made


def mutated(pool: list[bytes], rng: np.random.Generator) -> bytes:
    """One message that nobody wrote."""
    message = bytearray(pool[rng.integers(len(pool))])
    for _ in range(rng.integers(1, 5)):
        kind = rng.integers(5)
        if kind == 0 and message:
            message[rng.integers(len(message))] = rng.integers(256)
        elif kind == 1:
            del message[rng.integers(len(message) + 1) :]
        elif kind == 2:
            message += rng.bytes(rng.integers(1, 40))
        elif kind == 3 and len(message) >= FRAMING_BYTES:
            value = int(rng.choice([0, 1, 2**31, 2**32 - 1, ROWS, WIDTH, ROWS * WIDTH]))
            struct.pack_into("<I", message, 4 * int(rng.integers(2, 10)), value)
        else:
            other = pool[rng.integers(len(pool))]
            at = int(rng.integers(min(len(message), len(other)) + 1))
            message[at:] = other[at:]
    if len(message) >= FRAMING_BYTES and rng.random() < 0.9:
        _sign(message, rng)
    return bytes(message)


def _sign(message: bytearray, rng: np.random.Generator) -> None:
    end = FRAMING_BYTES - 4
    if rng.random() < 0.7:  # lengths that add up, so that what comes after them is reached
        payload = len(message) - FRAMING_BYTES
        coded = min(struct.unpack_from("<I", message, 32)[0], payload)
        struct.pack_into("<II", message, 32, coded, payload - coded)
    checksum = zlib.crc32(message[FRAMING_BYTES:], zlib.crc32(message[:end]))
    struct.pack_into("<I", message, end, checksum)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--minutes", type=float, default=10)
    asked.add_argument("--seed", type=int, default=0)
    told = asked.parse_args()
    rng = np.random.default_rng(told.seed)
    pool = seeds(rng)
    until_s = time.monotonic() + 60 * told.minutes
    tried = read = 0
    worst = 0.0
    tracemalloc.start()
    while time.monotonic() < until_s:
        message = mutated(pool, rng)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        try:
            read_packet(message, width=WIDTH, max_rows=ROWS, kept=ROWS * 5)
            read += 1
        except InputError:
            pass
        grown = tracemalloc.get_traced_memory()[1] - before
        worst = max(worst, grown / (64 + len(message)))
        if grown > 1024 * len(message) + 65536:
            raise SystemExit(f"{grown} bytes for a message of {len(message)}: {message.hex()}")
        tried += 1
    print(f"{tried} messages, {read} read, others refused; at most {worst:.0f} bytes taken a byte")


if __name__ == "__main__":
    main()
