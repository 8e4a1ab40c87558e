"""A run's figure by what it has spent, from the base model at nothing through every evaluated stage."""

import itertools

import numpy as np


def path_of(run, base, across="queries", part="test"):
    """A run's rows -> (across (n,), success (n,)), from the base model at 0 through every evaluated stage.

    part: test for held-out prompts, or train.
    """
    seen = [row for row in run if "success_test" in row]
    heights = [base[f"success_{part}"], *(row[f"success_{part}"] for row in seen)]
    return np.array([0, *(row[across] for row in seen)]), np.array(heights)


def spent_to(path, mark):
    """Where a path first has the mark, on straight lines between its points; infinite where it never has."""
    for (x, y), (after, higher) in itertools.pairwise(zip(*path, strict=True)):
        if y >= mark:
            return float(x)
        if higher >= mark:
            return float(x + (mark - y) / (higher - y) * (after - x))
    return np.inf


def area(path):
    """Mean height of a path over what it spans, on straight lines between its points."""
    x, y = path
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def until(path, last):
    """The part of a path as far as `last`, on a straight line to there; all of it where it is shorter."""
    x, y = path
    if last >= x[-1]:
        return path
    return np.append(x[x < last], last), np.append(y[x < last], np.interp(last, x, y))


def diversity_gap(run, other, base):
    """Diversity on train prompts of a run minus another's, each where it first has the success that both come to.

    That is the lower of their best ones, found on straight lines from the base model on.
    """
    paths = []
    for own in (run, other):
        rows = [base, *(row for row in own if "success_test" in row)]
        paths.append(([row["diversity_train"] for row in rows], [row["success_train"] for row in rows]))
    level = min(max(success) for _, success in paths)
    ours, theirs = (spent_to(path, level) for path in paths)
    return ours - theirs
