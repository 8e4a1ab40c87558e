"""A run's figure by what it has spent, from the base model at nothing through every evaluated stage."""

import itertools

import numpy as np


def path_of(run, base, figure="success_test", across="queries"):
    """A run's rows -> (across (n,), figure (n,)), from the base model at 0 through every evaluated stage."""
    seen = [row for row in run if figure in row]
    return np.array([0, *(r[across] for r in seen)]), np.array([base[figure], *(r[figure] for r in seen)])


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
    """The part of a path that is not beyond `last`."""
    return tuple(values[path[0] <= last] for values in path)
