"""Generalised linear models by mini-batch stochastic gradient descent.

With x a row with a 1 appended, W (features + 1, outputs) and z = x W, a step on a batch of B rows is

    W <- W - lr · (1/B) Σ x^T g(z, y)

| model | outputs | g(z, y) | loss |
| --- | --- | --- | --- |
| linear | 1 | z - y | (z - y)² / 2 |
| logistic | 1, y ∈ {-1, 1} | -y / (1 + exp(y z)) | log(1 + exp(-y z)) |
| svm | 1, y ∈ {-1, 1} | -y where y z < 1, else 0 | max(0, 1 - y z) |
| softmax | classes | softmax(z) - onehot(y) | -log softmax(z)[y] |

Source: the models of CorgiPile's in-database trainer. Differs: batches of more than one row; a bias; softmax
subtracts the largest output before it exponentiates.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, unknown_name
from capstan.shuffling.examples import Examples, Floats

Labels = NDArray[np.int64] | Floats


class _Loss(Protocol):
    def __call__(self, outputs: Floats, labels: Labels) -> tuple[Floats, Floats]:
        """Losses (rows,) and their gradient by the outputs (rows, outputs)."""
        ...


def _linear(outputs: Floats, labels: Labels) -> tuple[Floats, Floats]:
    apart = outputs - labels[:, None]
    return 0.5 * apart[:, 0] ** 2, apart


def _signs(labels: Labels) -> Floats:
    return np.where(labels > 0, 1.0, -1.0)[:, None]


def _logistic(outputs: Floats, labels: Labels) -> tuple[Floats, Floats]:
    signs = _signs(labels)
    margins = signs * outputs
    # 1 / (1 + exp(m)) without overflow: the exponent is never above 0.
    small = np.exp(-np.abs(margins))
    wrong = np.where(margins > 0, small / (1 + small), 1 / (1 + small))
    return (np.maximum(-margins, 0) + np.log1p(small))[:, 0], -signs * wrong


def _hinge(outputs: Floats, labels: Labels) -> tuple[Floats, Floats]:
    signs = _signs(labels)
    lacking = 1 - signs * outputs
    return np.maximum(lacking, 0)[:, 0], np.where(lacking > 0, -signs, 0.0)


def _softmax(outputs: Floats, labels: Labels) -> tuple[Floats, Floats]:
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=1, keepdims=True)
    gradient = exponentials / sums
    at = (np.arange(len(outputs)), labels.astype(np.int64))
    losses = np.log(sums[:, 0]) - shifted[at]
    gradient[at] -= 1
    return losses, gradient


MODELS: dict[str, _Loss] = {"linear": _linear, "logistic": _logistic, "svm": _hinge, "softmax": _softmax}


@dataclass(frozen=True, kw_only=True)
class LinearModel:
    """A model and its weights, (features + 1, outputs): the last row is the bias. A step changes the weights
    in place."""

    kind: str
    weights: Floats

    @classmethod
    def begin(cls, kind: str, num_features: int, num_classes: int) -> "LinearModel":
        """A model whose weights are 0.

        Raises:
            UsageError: an unknown kind.
            InputError: the label has not as many classes as the kind wants.
        """
        if kind not in MODELS:
            raise unknown_name("model", kind, MODELS)
        if kind in ("logistic", "svm") and num_classes != 2:
            raise InputError(
                f"{kind} wants a label with two classes; this one has {num_classes}. "
                + ("Take --model softmax." if num_classes > 2 else "Is it the right column?")
            )
        if kind == "softmax" and num_classes < 2:
            raise InputError("softmax wants a label with two classes or more; this one has 1.")
        outputs = num_classes if kind == "softmax" else 1
        return cls(kind=kind, weights=np.zeros((num_features + 1, outputs)))

    def outputs(self, x: Floats) -> Floats:
        """(rows, outputs)."""
        found: Floats = x @ self.weights[:-1] + self.weights[-1]
        return found

    def step(self, x: Floats, y: Labels, lr: float) -> float:
        """One step on a batch; returns the sum of the losses before it."""
        losses, gradient = MODELS[self.kind](self.outputs(x), y)
        gradient *= lr / len(x)
        self.weights[:-1] -= x.T @ gradient
        self.weights[-1] -= gradient.sum(axis=0)
        return float(losses.sum())

    def gradients(self, x: Floats, y: Labels) -> Floats:
        """(rows, weights): the gradient of each row's loss, for the analysis of clusters."""
        _, by_output = MODELS[self.kind](self.outputs(x), y)
        extended = np.append(x, np.ones((len(x), 1)), axis=1)
        return (extended[:, :, None] * by_output[:, None, :]).reshape(len(x), -1)

    def predict(self, x: Floats) -> Labels:
        """(rows,): numbers of classes, or standardised values."""
        outputs = self.outputs(x)
        if self.kind == "linear":
            return outputs[:, 0]
        if self.kind == "softmax":
            best: Labels = outputs.argmax(axis=1)
            return best
        return (outputs[:, 0] > 0).astype(np.int64)


@dataclass
class Score:
    """How good predictions are, added up batch by batch."""

    count: int = 0
    right: int = 0
    unknown: int = 0
    squares: float = 0.0
    label_sum: float = 0.0
    label_squares: float = 0.0

    def add(self, model: LinearModel, x: Floats, y: Labels) -> None:
        """Count a batch."""
        predicted = model.predict(x)
        self.count += len(y)
        if model.kind == "linear":
            self.squares += float(((predicted - y) ** 2).sum())
            self.label_sum += float(y.sum())
            self.label_squares += float((y**2).sum())
        else:
            self.right += int((predicted == y).sum())
            self.unknown += int((y < 0).sum())

    def to_dict(self, examples: Examples) -> dict[str, float]:
        """Accuracy, or mean squared error (in the label's unit) and R²."""
        if examples.classes:
            return {"accuracy": self.right / self.count}
        total = self.label_squares - self.label_sum**2 / self.count
        return {
            "mean_squared_error": self.squares / self.count * examples.label_scale**2,
            "r2": 1 - self.squares / total if total > 0 else 0.0,
        }
