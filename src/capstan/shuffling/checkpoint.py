"""The state of a training run in one file, written whole or not at all: an .npz without pickles."""

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capstan.errors import InputError
from capstan.shuffling.examples import Examples, Floats
from capstan.storage import open_atomically

_FORMAT = "capstan.shuffle.train.1"


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One epoch: mean loss before each step, seconds, rows a second, and the score on the test rows."""

    epoch: int
    loss: float
    seconds: float
    rows_per_s: float
    score: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the score's entries among the others."""
        told = asdict(self)
        score: dict[str, float] = told.pop("score")
        return told | score


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a run stands: `step` steps of `epoch` are done. `run` says which run it is."""

    run: str
    examples: Examples
    epoch: int
    step: int
    loss_sum: float
    epoch_seconds: float
    reports: tuple[EpochReport, ...]
    weights: Floats
    average: Floats

    def save(self, path: Path) -> None:
        """Write it in place of the one before.

        Raises:
            DoesNotFit, InputError: the place cannot be written.
        """
        told = {
            "format": _FORMAT,
            "run": self.run,
            "examples": self.examples.to_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "epoch_seconds": self.epoch_seconds,
            "reports": [asdict(report) for report in self.reports],
        }
        text = np.frombuffer(json.dumps(told).encode(), np.uint8)
        with open_atomically(path) as file:
            np.savez(file, told=text, weights=self.weights, average=self.average)

    @classmethod
    def load(cls, path: Path, *, run: str) -> "Checkpoint | None":
        """The checkpoint there, or None where there is none.

        Raises:
            InputError: it is damaged, or of another run.
        """
        try:
            with path.open("rb") as file, np.load(file) as kept:
                told = json.loads(kept["told"].tobytes())
                weights, average = kept["weights"], kept["average"]
            if told["format"] != _FORMAT:
                raise ValueError(f"its format is {told['format']!r}")
            if told["run"] != run:
                raise InputError(
                    f"The checkpoint {path} is of another run: other data, or other options. Name another "
                    "file, or remove it to begin anew."
                )
            return cls(
                run=run,
                examples=Examples.from_dict(told["examples"]),
                epoch=told["epoch"],
                step=told["step"],
                loss_sum=told["loss_sum"],
                epoch_seconds=told["epoch_seconds"],
                reports=tuple(EpochReport(**report) for report in told["reports"]),
                weights=weights,
                average=average,
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is no checkpoint that `capstan shuffle train` wrote: {error}. Name another file."
            ) from error
