"""How well scores rank what was clicked above what was not."""

import numpy as np

from capstan.errors import InputError


def area_under_curve(labels: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a positive sample scores above a negative one; a tie counts half.

        AUC = (Σ ranks of positives - P (P + 1) / 2) / (P N)    ranks from 1, ties have their mean

    Raises:
        InputError: all labels are the same, or a score is not a number.
    """
    positives = int(np.count_nonzero(labels))
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise InputError(
            f"An AUC needs positive and negative samples; there are {positives} and {negatives}."
        )
    if np.isnan(scores).any():
        raise InputError("A score is not a number: training diverged. Lower the learning rates.")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = last - (counts - 1) / 2
    return float(
        (mean_rank[inverse][labels > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    )
