"""C for the machine at hand: compiled once when first needed, kept in the cache folder.

Only for loops that no library has at the speed of the memory; every caller has another way when there is
no compiler.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from capstan.hardware.cache_folder import cache_folder
from capstan.hardware.processor import processor_name

logger = logging.getLogger(__name__)

_FLAGS = ("-O3", "-march=native", "-pthread", "-shared", "-fPIC")
_PATIENCE_S = 120.0


def compiled(source: Path, defines: Mapping[str, int]) -> ctypes.CDLL | None:
    """The library made from the C file `source` with these macros, or None where it cannot be made.

    Kept under a name that depends on the source, the macros, the compiler and the processor.
    """
    return _compiled(source, tuple(sorted(defines.items())))


@cache
def _compiled(source: Path, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        logger.info("No C compiler was found ($CC, cc, gcc, clang): %s is not used.", source.name)
        return None
    macros = [f"-D{name}={value}" for name, value in defines]
    facts = (source.read_text(), compiler, *_FLAGS, *macros, processor_name())
    name = f"{source.stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.so"
    library = cache_folder() / "compiled" / name
    try:
        kept = _loaded(library)
        if kept is None:
            library.parent.mkdir(parents=True, exist_ok=True)
            _compile([compiler, *_FLAGS, *macros, str(source)], library)
        return kept or ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("%s could not be compiled and is not used: %s", source.name, error)
        return None


def _loaded(library: Path) -> ctypes.CDLL | None:
    """A library that was kept, or None where there is none or it is damaged: then it is made again."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


def _compiler() -> str | None:
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compile(command: list[str], library: Path) -> None:
    """Several processes may do this at once: each writes a file of its own and renames it."""
    descriptor, made = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(descriptor)
    try:
        done = subprocess.run(
            [*command, "-o", made, "-lm"], capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
        if done.returncode != 0:
            raise OSError(done.stderr.strip()[-400:])
        os.replace(made, library)
    finally:
        Path(made).unlink(missing_ok=True)
