"""Branch contrast: which branches of a group are trained on."""

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
