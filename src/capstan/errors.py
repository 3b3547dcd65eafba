"""Every error that Capstan raises on purpose. Each says what was wanted, what was found, what to do.

CapstanError
├── UsageError           the call or command line itself is wrong (exit code 2)
├── InputError           a file, line, packet or tensor is not what it should be
├── UnsupportedModel     the model cannot be run by this engine
├── DoesNotFit           memory or disk granted is too small for the plan
├── MissingExtra         an optional package is not installed
├── DeviceError          hardware that was asked for is not there or failed
└── TimeoutExpired       a wait reached its bound: a peer, a disk or a thread did not answer
"""

import importlib.util
from collections.abc import Iterable
from difflib import get_close_matches


class CapstanError(Exception):
    """The root: catch this to catch everything that Capstan raises on purpose."""

    exit_code = 1


class UsageError(CapstanError):
    """The call or the command line is wrong."""

    exit_code = 2


class InputError(CapstanError):
    """A file, line, packet or tensor is not what it should be."""


class UnsupportedModel(CapstanError):
    """The model cannot be run by this engine."""


class DoesNotFit(CapstanError):
    """The memory or disk that was granted is too small."""


class MissingExtra(CapstanError):
    """An optional package is not installed."""


class DeviceError(CapstanError):
    """Hardware that was asked for is not there, or it failed."""


class TimeoutExpired(CapstanError):
    """A wait reached its bound."""


def require_extra(extra: str, *modules: str) -> None:
    """Raise `MissingExtra`, naming what to install, unless every module can be imported."""
    missing = [name for name in modules if not _can_import(name)]
    if missing:
        raise MissingExtra(
            f"This needs {', '.join(missing)}, which is not installed. "
            f"Install it with: pip install 'capstan-ml[{extra}]'"
        )


def _can_import(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that would contain it
        return False


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """An error for a name that is not among `known`, suggesting the nearest one."""
    names = sorted(known)
    if not names:
        return UsageError(f"There is no {kind} {name!r}, nor another.")
    nearest = get_close_matches(name, names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UsageError(f"There is no {kind} {name!r}.{hint} Known: {', '.join(names)}.")
