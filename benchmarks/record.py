"""Writing dated records: what was measured, where, with what, and how it stands against its bars."""

import json
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from capstan.hardware import Machine

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("capstan-ml", "torch", "transformers", "safetensors", "numpy", "scipy", "accelerate")


def write_record(
    name: str,
    *,
    claim: str,
    machine: Machine,
    figures: dict[str, Any],
    bound: dict[str, Any],
    bars: dict[str, Any],
    peers: dict[str, Any] | None = None,
    folder: Path = RECORDS,
    **more: Any,
) -> Path:
    """Write `<folder>/<name>.json`; `more` goes in as it is."""
    record = {
        "claim": claim,
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": date.today().isoformat(),
        "commit": _asked_of_git("rev-parse", "--short", "HEAD"),
        "tree": _asked_of_git("rev-parse", "HEAD:src"),
        "machine": machine.as_dict(),
        "versions": {"python": platform.python_version()} | _versions(),
        "figures": figures,
        "peers": peers or {},
        "bound": bound,
        "bars": bars,
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _asked_of_git(*words: str) -> str:
    asked = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
