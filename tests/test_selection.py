"""The branch contrast against a plain loop over the definition."""

import numpy as np
import pytest

from b2diffurl.selection import select_contrasts


def brute_force(scores, pos, neg):
    kept = []
    for g, row in enumerate(scores):
        best = min(range(len(row)), key=lambda k: (-row[k], k))
        worst = min(range(len(row)), key=lambda k: (row[k], k))
        if row[best] >= pos:
            kept.append((g, best))
        if row[worst] < neg:
            kept.append((g, worst))
    return kept


def test_brute_force_with_ties():
    rng = np.random.default_rng(0)
    for branches in (1, 2, 5):
        scores = rng.normal(size=(500, branches)).round(1)
        assert select_contrasts(scores, 0.5, -0.5) == brute_force(scores.tolist(), 0.5, -0.5)


def test_thresholds_are_closed_above_and_open_below():
    assert select_contrasts([[0.5, 0.0, -0.5]], 0.5, -0.5) == [(0, 0)]
    assert select_contrasts([[0.49, 0.0, -0.51]], 0.5, -0.5) == [(0, 2)]


def test_best_comes_before_worst_and_ties_take_the_first():
    assert select_contrasts([[-1, 2, 2, -1]], 0.5, -0.5) == [(0, 1), (0, 0)]


def test_groups_do_not_see_each_other():
    assert select_contrasts([[3.0, 2.9], [0.1, 0.0]], 0.5, -0.5) == [(0, 0)]


def test_nothing_selected_is_an_empty_list():
    assert select_contrasts(np.zeros((4, 5)), 0.5, -0.5) == []


@pytest.mark.parametrize("scores", [[[float("nan"), 1.0]], [[np.inf]], [1.0, 2.0]])
def test_bad_scores(scores):
    with pytest.raises(ValueError, match="scores must be"):
        select_contrasts(scores, 0.5, -0.5)
