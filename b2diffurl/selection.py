"""Which branches of a group are trained on: branch contrast, and D-Fusion's references and bases."""

import numpy as np


def select_contrasts(scores, pos_threshold, neg_threshold):
    """Best and worst branch of every group, if good and bad enough -> list of (group, branch), best before worst.

    scores: (G, K) normalised rewards. The arg-max is kept if it is >= pos_threshold, the arg-min if it is
    < neg_threshold; ties go to the first branch. Raises ValueError for another shape or a non-finite score.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"scores must be (groups, branches), not of shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    kept = []
    for group, row in enumerate(scores):
        best, worst = int(row.argmax()), int(row.argmin())
        if row[best] >= pos_threshold:
            kept.append((group, best))
        if row[worst] < neg_threshold:
            kept.append((group, worst))
    return kept


def select_pairs(scores):
    """D-Fusion's references and bases -> list of (group, reference, base), by group and rank.

    scores: (G, K) rewards, K of 4 at least. Of a group's K images the best K // 4 are references, each for two of the
    worst 2 (K // 4), in the order of their rewards, ties by branch; no pair is made where the reference is no better.
    Raises ValueError for another shape.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] < 4:
        raise ValueError(f"scores must be (groups, 4 branches or more), not of shape {scores.shape}")
    order, count = np.argsort(-scores, axis=1, kind="stable"), 2 * (scores.shape[1] // 4)
    pairs = [
        (group, int(ranked[place // 2]), int(ranked[len(ranked) - count + place]))
        for group, ranked in enumerate(order)
        for place in range(count)
    ]
    return [(group, best, worst) for group, best, worst in pairs if scores[group, best] > scores[group, worst]]
