"""The variance within and between groups adds up, and the figure's data are there."""

import json

import numpy as np
import pytest

from b2diffurl import when_decided
from b2diffurl.errors import UserError
from b2diffurl.run.command import parse


@pytest.mark.parametrize("between", [0.0, 1.0])
def test_variance_components_are_unbiased(between):
    """Means over many small draws, prompts with one group only among them, are what was put in."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        prompts = rng.choice(list("abcdefgh"), size=16)
        offset = {p: rng.normal() * 3 for p in "abcdefgh"}  # between prompts: neither component
        values = rng.normal(size=(16, 5)) * 0.7 + np.sqrt(between) * rng.normal(size=(16, 1))
        values += np.array([offset[p] for p in prompts])[:, None]
        found.append(when_decided.split_variance(values, np.repeat(prompts, 5).tolist()))
    assert np.mean([f["within"] for f in found]) == pytest.approx(0.49, rel=0.03)
    # a true 0 comes out as a little more, since negative estimates count as 0
    assert np.mean([f["between_groups"] for f in found]) == pytest.approx(between, abs=0.05)
    assert when_decided.split_variance(np.ones((4, 5)), ["a"] * 20) == {"within": 0, "between_groups": 0}


def test_groups_of_one_image_are_refused(tmp_path):
    config = parse(["test", "--config", "config/stage_process.py:shapes", "--config.sample.branches=1"])[0]
    with pytest.raises(UserError, match=r"config\.sample\.branches=1: must be at least 2"):
        when_decided.main(config, str(tmp_path), "")


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
