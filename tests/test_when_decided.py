"""The variance within and between groups adds up, and the figure's data are there."""

import json

import numpy as np
import pytest

from b2diffurl import when_decided
from b2diffurl.configuration import parse


def test_variances_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    prompts = rng.choice(["a", "b", "c"], size=40)
    values = rng.normal(size=(40, 5)) + rng.normal(size=(40, 1)) + (prompts == "a")[:, None]
    found = when_decided.split_variance(values, np.repeat(prompts, 5).tolist())
    assert sum(found.values()) == pytest.approx(values.var())
    assert found["within"] == pytest.approx(np.mean([row.var() for row in values]))
    same = when_decided.split_variance(np.repeat(values[:, :1], 5, axis=1), np.repeat(prompts, 5).tolist())
    assert same["within"] == pytest.approx(0, abs=1e-12)


def test_little_is_open_at_the_last_step_and_all_at_the_first(tmp_path):
    flags = ["--config.sample.groups=8", "--config.sample.branches=4", "--config.sample.num_steps=6",
             "--config.schedule.left=3", "--config.schedule.right=6"]  # fmt: skip
    config = parse(["test", "--config", "config/stage_process.py:shapes", *flags])[0]
    when_decided.main(config, str(tmp_path), "")
    rows = json.loads((tmp_path / "when_decided.json").read_text())["rows"]
    assert [(r["guidance"], r["steps_left"]) for r in rows] == [(g, s) for g in (2.0, 5.0) for s in (6, 4, 2)]
    for first, _, last in (rows[:3], rows[3:]):
        assert last["reward"]["within"] < first["reward"]["within"] / 3
    assert (tmp_path / "when_decided.png").stat().st_size > 5000
