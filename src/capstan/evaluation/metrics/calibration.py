"""Does the model know how sure it may be? Expected calibration error, Platt scaling, selective accuracy.

Confidence p is the probability of the answer, y whether it is right.

    ECE = sum over bins of (n_b / n) |mean p - mean y|

Source: HELM, `metrics/basic_metrics.py`; uncertainty-calibration 0.1.4 (Kumar et al. 2019). The bins of
`ece_10_bin` hold equally many; those of `ece_1_bin` are one.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capstan.evaluation.metrics.stat import Stat, stat

_EDGE = 1e-12
# What scikit-learn's logistic regression stops at; the same, so that its figures are met exactly.
_GRADIENT_TOLERANCE, _MOST_STEPS, _WEAK_PENALTY = 1e-4, 100, 1e10

Floats = NDArray[np.float64]


def equal_mass_edges(confidences: Sequence[float], num_bins: int) -> list[float]:
    """Upper edges of bins that hold about equally many: midway between neighbours, the last one 1."""
    ordered = np.sort(np.asarray(confidences, dtype=np.float64))
    parts = np.array_split(ordered, min(num_bins, len(ordered)))
    middles = [float((left[-1] + right[0]) / 2.0) for left, right in pairwise(parts)]
    return sorted({*middles, 1.0})


def expected_calibration_error(
    confidences: Sequence[float], right: Sequence[int], edges: Sequence[float]
) -> float:
    """The mean distance of confidence and accuracy over bins with these upper edges."""
    p, y = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    # A confidence a rounding above 1 belongs to the last bin.
    bins = np.minimum(np.searchsorted(np.asarray(edges), p, side="left"), len(edges) - 1)
    total = 0.0
    for each in range(len(edges)):
        inside = bins == each
        if inside.any():
            total += inside.mean() * abs(p[inside].mean() - y[inside].mean())
    return float(total)


class Platt(NamedTuple):
    """The logistic curve that maps log-odds of confidence to log-odds of being right."""

    slope: float
    intercept: float

    def __call__(self, confidences: Sequence[float]) -> Floats:
        """Calibrated confidences."""
        return _sigmoid(_log_odds(confidences) * self.slope + self.intercept)


def fit_platt(confidences: Sequence[float], right: Sequence[int]) -> Platt:
    """Fit by maximum likelihood with L-BFGS from zero.

    Source: the objective, penalty (C = 1e10) and stopping rule of scikit-learn's LogisticRegression.
    """
    x, y = _log_odds(confidences), np.asarray(right, dtype=np.float64)
    weight, penalty = 1.0 / len(y), 1.0 / (_WEAK_PENALTY * len(y))

    def loss(w: Floats) -> tuple[float, Floats]:
        raw = x * w[0] + w[1]
        value = float((weight * (np.logaddexp(0.0, raw) - y * raw)).sum() + 0.5 * penalty * w[0] ** 2)
        pull = weight * (_sigmoid(raw) - y)
        return value, np.array([x @ pull + penalty * w[0], pull.sum()])

    from scipy.optimize import minimize  # takes longer to import than all of this room

    found = minimize(
        loss,
        np.zeros(2),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": _MOST_STEPS,
            "maxls": 50,
            "gtol": _GRADIENT_TOLERANCE,
            "ftol": 64 * np.finfo(float).eps,
        },
    )
    return Platt(float(found.x[0]), float(found.x[1]))


def _log_odds(confidences: Sequence[float]) -> Floats:
    p = np.clip(np.asarray(confidences, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(np.log(p / (1 - p)))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def selective_accuracy(confidences: Sequence[float], right: Sequence[int]) -> tuple[float, float]:
    """Mean over i of the accuracy of the i most confident, and the accuracy of the most confident tenth."""
    order = np.argsort(-np.asarray(confidences, dtype=np.float64))
    accuracies = np.cumsum(np.asarray(right)[order]) / np.arange(1, len(order) + 1)
    return float(accuracies.mean()), float(accuracies[int(0.1 * len(order))])


def calibration_stats(confidences: Sequence[float], right: Sequence[int]) -> list[Stat]:
    """All statistics of the family, by HELM's names; nothing of nothing."""
    if not confidences:
        return []
    ten = _ece(confidences, right, 10)
    area, tenth = selective_accuracy(confidences, right)
    stats = [
        stat("ece_10_bin", ten),
        stat("ece_1_bin", expected_calibration_error(confidences, right, [1.0])),
        stat("selective_cov_acc_area", area),
        stat("selective_acc@10", tenth),
    ]
    if sum(right) in (0, len(right)):  # there is no curve to fit; one constant is calibrated
        return [*stats, stat("platt_ece_10_bin", 0.0), stat("platt_ece_1_bin", 0.0)]
    platt = fit_platt(confidences, right)
    fitted = platt(confidences).tolist()
    return [
        *stats,
        stat("platt_coef", platt.slope),
        stat("platt_intercept", platt.intercept),
        stat("platt_ece_10_bin", _ece(fitted, right, 10)),
        stat("platt_ece_1_bin", expected_calibration_error(fitted, right, [1.0])),
    ]


def _ece(confidences: Sequence[float], right: Sequence[int], num_bins: int) -> float:
    return expected_calibration_error(confidences, right, equal_mass_edges(confidences, num_bins))
