"""Where Capstan keeps what it measured."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$CAPSTAN_CACHE, or capstan in $XDG_CACHE_HOME, or ~/.cache/capstan; not made here."""
    if chosen := os.environ.get("CAPSTAN_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "capstan"
    return Path("~/.cache/capstan").expanduser()
