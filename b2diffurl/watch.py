"""Is the reward gamed? Then it rises, and what it stands for does not: the oracle, or another reward of a mix.

And does it rise at all?
"""

import numpy as np

WINDOW = 4  # stages, whose mean is compared with that of as many before them
CLEAR = 2.0  # standard errors


def parted(reward, others):
    """Names of the series that have not risen where the reward clearly has.

    reward: its means by stage; others: {name: the same of another figure}. Clearly: the mean of the last WINDOW stages
    is CLEAR standard errors above that of the WINDOW before. None before there are so many stages.
    """
    if len(reward) < 2 * WINDOW or _rise(reward) < CLEAR:
        return []
    return [name for name, series in others.items() if len(series) == len(reward) and _rise(series) <= 0]


def level(series, window):
    """Whether a series has not risen: the mean of its last `window` values is not above that of as many before.

    False before it has so many, and for a window of 0.
    """
    return 0 < 2 * window <= len(series) and np.diff(np.reshape(series[-2 * window :], (2, window)).mean(1))[0] <= 0


def _rise(series):
    """From one window to the next, in standard errors."""
    before, after = np.asarray(series[-2 * WINDOW :], dtype=float).reshape(2, WINDOW)
    error = np.sqrt((before.var(ddof=1) + after.var(ddof=1)) / WINDOW)
    return (after.mean() - before.mean()) / (error + 1e-12)
