"""The AUC is the share of pairs that are ranked right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import InputError
from capstan.recommendation.area_under_curve import area_under_curve


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2))
def test_it_is_the_share_of_pairs_ranked_right_and_half_of_the_ties(samples):
    positives = [score for label, score in samples if label]
    negatives = [score for label, score in samples if not label]
    labels, scores = (np.array(each, dtype=float) for each in zip(*samples, strict=True))
    if not positives or not negatives:
        with pytest.raises(InputError, match="positive and negative"):
            area_under_curve(labels, scores)
        return
    won = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert area_under_curve(labels, scores) == pytest.approx(won / len(positives) / len(negatives), abs=1e-12)


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(InputError, match="diverged"):
        area_under_curve(np.array([0, 1]), np.array([0.0, np.nan]))
