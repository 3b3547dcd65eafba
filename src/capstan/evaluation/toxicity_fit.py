"""A toxicity scorer of one's own: words and letters weighed by logistic regression, from a labelled CSV.

    score = sigmoid(bias + sum of weight * tf-idf), features hashed into 2^18 places

It comes with a card: how well it told held-out comments apart, also where groups of people are named. It is
no Perspective API, and figures made with it carry its name.

Source: HELM's CivilComments columns; Borkan et al. 2019 (arXiv 1903.04561) for figures by group.
"""

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from capstan.errors import InputError
from capstan.storage import write_atomically

_PLACES, _PENALTY, _FORMAT = 1 << 18, 1e-4, "capstan.toxicity-scorer"
_GROUPS = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ToxicityScorer:
    """Gives each text a score from 0 to 1. `name` stands in the names of statistics."""

    name: str
    bias: float
    places: NDArray[np.int64]
    weights: Floats
    card: dict[str, Any]

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """The scores of texts."""
        dense = np.zeros(_PLACES)
        dense[self.places] = self.weights
        return [float(each) for each in _sigmoid(features(texts) @ dense + self.bias)]

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        told = {"format": _FORMAT, "version": 1, "name": self.name, "bias": self.bias, "card": self.card}
        told |= {"places": self.places.tolist(), "weights": np.round(self.weights, 6).tolist()}
        write_atomically(path, json.dumps(told))

    @classmethod
    def load(cls, path: Path) -> "ToxicityScorer":
        """Read a saved one.

        Raises:
            InputError: it is none, or damaged.
        """
        try:
            told = json.loads(path.read_text())
            if told["format"] != _FORMAT or told["version"] != 1:
                raise InputError(
                    f"{path} is of another version. Fit it again with `capstan evaluate toxicity`."
                )
            places, weights = np.array(told["places"], dtype=np.int64), np.array(told["weights"], dtype=float)
            if places.shape != weights.shape or (
                len(places) and not 0 <= places.min() <= places.max() < _PLACES
            ):
                raise ValueError("places and weights do not fit")
            return cls(told["name"], float(told["bias"]), places, weights, told["card"])
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no toxicity scorer, or damaged: {error!r}.") from error


def features(texts: Sequence[str]) -> csr_matrix:
    """Words, pairs of words and runs of four letters, hashed; rows of length one."""
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        counts: dict[int, float] = {}
        for feature in _features(text):
            place = int.from_bytes(
                hashlib.blake2b(feature.encode(errors="replace"), digest_size=4).digest(), "big"
            )
            counts[place % _PLACES] = counts.get(place % _PLACES, 0.0) + 1.0
        weights = {place: 1.0 + np.log(count) for place, count in counts.items()}
        length = float(np.sqrt(sum(each**2 for each in weights.values()))) or 1.0
        rows += [row] * len(weights)
        columns += list(weights)
        values += [each / length for each in weights.values()]
    return csr_matrix((values, (rows, columns)), shape=(len(texts), _PLACES))


def _features(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    pairs = [f"{one} {other}" for one, other in pairwise(words)]
    letters = [word[at : at + 4] for word in words for at in range(max(0, len(word) - 3))]
    return words + pairs + [f"#{each}" for each in letters]


def fit_scorer(path: Path, *, name: str, limit: int | None = None) -> ToxicityScorer:
    """Fit on a CSV with `comment_text` and `toxicity`; a fifth is held out for the card.

    Raises:
        InputError: columns are missing, or only one kind of comment is there.
    """
    rows = _rows(path, limit)
    texts, labels = (
        [row["comment_text"] for row in rows],
        np.array([_toxic(row) for row in rows], dtype=float),
    )
    if not 0 < labels.sum() < len(labels):
        raise InputError(
            f"{path} has {len(rows)} comments of one kind; both toxic ones and others are wanted."
        )
    held = np.arange(len(rows)) % 5 == 4
    x = features(texts)
    bias, weights = _fitted(x[~held], labels[~held])
    places = np.flatnonzero(weights)
    scores = _sigmoid(x[held] @ weights + bias)
    at = np.flatnonzero(held)
    by_group = {
        group: _quality(scores[mask], labels[held][mask])
        for group in _GROUPS
        if group in rows[0] and (mask := np.array([float(rows[i][group] or 0) >= 0.5 for i in at])).any()
    }
    card = {"trained_on": path.name, "num_training": int((~held).sum()), "num_held_out": int(held.sum())}
    card |= {"held_out": _quality(scores, labels[held]), "by_group": by_group}
    return ToxicityScorer(name, bias, places, weights[places], card)


def _rows(path: Path, limit: int | None) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            missing = {"comment_text", "toxicity"} - set(reader.fieldnames or ())
            if missing:
                raise InputError(f"{path} lacks the columns {', '.join(sorted(missing))}.")
            return [row for at, row in enumerate(reader) if limit is None or at < limit]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _toxic(row: dict[str, str]) -> float:
    try:
        return float(float(row["toxicity"] or 0) >= 0.5)
    except ValueError as error:
        raise InputError(f"A toxicity of {row['toxicity']!r} is no number.") from error


def _fitted(x: csr_matrix, y: Floats) -> tuple[float, Floats]:
    def loss(w: Floats) -> tuple[float, Floats]:
        raw = x @ w[1:] + w[0]
        pull = (_sigmoid(raw) - y) / len(y)
        value = float((np.logaddexp(0, raw) - y * raw).mean() + 0.5 * _PENALTY * (w[1:] @ w[1:]))
        return value, np.concatenate([[pull.sum()], x.T @ pull + _PENALTY * w[1:]])

    found = minimize(loss, np.zeros(_PLACES + 1), jac=True, method="L-BFGS-B", options={"maxiter": 100})
    return float(found.x[0]), np.asarray(found.x[1:])


def _quality(scores: Floats, labels: Floats) -> dict[str, float | int | None]:
    """Area under the ROC curve, and false positives among the harmless."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    auc = None
    if len(positive) and len(negative):
        ranks = np.searchsorted(np.sort(negative), positive, side="left")
        upper = np.searchsorted(np.sort(negative), positive, side="right")
        auc = float(((ranks + upper) / 2).mean() / len(negative))
    rate = float((negative >= 0.5).mean()) if len(negative) else None
    return {"count": len(scores), "auc": auc, "false_positive_rate": rate}


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.asarray(x))))
