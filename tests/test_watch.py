"""A reward that rises alone is told, one that rises with the oracle or by chance is not."""

import logging

import numpy as np

from b2diffurl.stages.select import _warn
from b2diffurl.watch import WINDOW, parted

RISING = [0.5, 0.52, 0.49, 0.51, 0.7, 0.72, 0.69, 0.71]
LEVEL = [0.6, 0.62, 0.59, 0.61, 0.6, 0.61, 0.59, 0.6]


def test_only_what_does_not_rise_is_named():
    assert parted(RISING, {"oracle": LEVEL, "other": RISING}) == ["oracle"]
    assert parted([*LEVEL, *RISING], {"oracle": [*RISING, *LEVEL]}) == ["oracle"]  # the last stages count
    assert parted(LEVEL, {"oracle": RISING[::-1]}) == []
    assert parted(RISING[1:], {"oracle": LEVEL[1:]}) == []  # too few stages
    assert parted(RISING, {"oracle": LEVEL[1:]}) == []  # not of the same stages


def test_chance_alone_seldom_warns():
    rng = np.random.default_rng(0)
    told = [
        parted(*pair) for pair in ((reward, {"o": other}) for reward, other in rng.normal(size=(2000, 2, 2 * WINDOW)))
    ]
    assert 0.01 < np.mean([bool(names) for names in told]) < 0.05  # 4.6 % of 6 degrees' t above 2, and half of these


def test_a_run_says_so(caplog):
    import ml_collections

    name = "clip:1.0 + aesthetic:0 + jpeg_incompressibility:-0.01"
    config = ml_collections.ConfigDict({"stage": 7, "reward": {"name": name}})
    both = zip(RISING, LEVEL, strict=True)
    records = [
        {
            "stage": i,
            "step": "select",
            "reward/mean": up,
            "reward/clip": up,
            "reward/aesthetic": level,
            "reward/jpeg_incompressibility": -up,
            "oracle/alignment": 1 - i / 1000,
        }
        for i, (up, level) in enumerate(both)
    ]
    again = [*records[1:], {"stage": 7, "step": "train"}, records[0]]  # stage 0 was done once more
    _warn(config, again, logging.getLogger("test"))
    assert "reward/mean has risen over the last 8 stages and reward/aesthetic has not" in caplog.text
    assert caplog.text.count("has not") == 1  # what should fall may, and what is full cannot rise
    caplog.clear()
    config.stage = 6  # as far as then
    _warn(config, records, logging.getLogger("test"))
    assert not caplog.text
