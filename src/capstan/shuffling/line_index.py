"""Where each line of a text file begins: found in one pass, then kept."""

import hashlib
import logging
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capstan.errors import DoesNotFit, InputError
from capstan.hardware.cache_folder import cache_folder
from capstan.shuffling.files import RangedFile
from capstan.storage import open_atomically

logger = logging.getLogger(__name__)
_CHUNK_BYTES = 2**24
_LINE_BREAK = 10


def line_starts(file: RangedFile) -> NDArray[np.int64]:
    """The first byte of each line that is not empty, and at last the size of the file."""
    breaks = [np.array([-1])]
    offset = 0
    with file.open() as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == _LINE_BREAK) + offset)
            offset += len(chunk)
    starts = np.append(np.concatenate(breaks) + 1, offset)
    lengths = np.diff(starts)
    filled = lengths > 1  # an empty line is its break alone
    filled[-1:] = lengths[-1:] > 0  # what follows the last break
    return np.append(starts[:-1][filled], offset)


def largest_feature(file: RangedFile) -> int:
    """The largest index of a LIBSVM file; -1 where there is none."""
    largest, rest = -1, b""
    with file.open() as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            data, _, rest = (rest + chunk).rpartition(b"\n")
            largest = max(largest, *map(int, re.findall(rb"\s(\d+):", data)), -1)
    return max(largest, *map(int, re.findall(rb"\s(\d+):", rest)), -1)


def kept_index(file: RangedFile, *, counts_features: bool) -> tuple[NDArray[np.int64], int]:
    """`line_starts` and, where asked for, `largest_feature`: from the cache folder if this file was seen."""
    name = file.name if file.is_remote else str(Path(file.name).resolve())
    key = hashlib.sha256(f"{name}|{file.identity}|{counts_features}".encode()).hexdigest()[:32]
    place = cache_folder() / "line-index" / f"{key}.npy"
    try:
        kept = np.load(place, mmap_mode=None)
        return kept[1:], int(kept[0])
    except (OSError, ValueError, EOFError, IndexError):
        pass  # not there, or not whole: it is made again
    starts, largest = line_starts(file), largest_feature(file) if counts_features else -1
    file.require_same()
    try:
        with open_atomically(place) as opened:
            np.save(opened, np.append(largest, starts))
    except (InputError, DoesNotFit) as error:
        logger.warning("The index of %s cannot be kept, so it will be made each time: %s", file, error)
    return starts, largest
