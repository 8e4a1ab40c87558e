"""Prompts by the variance of their rewards: against a loop, and through the stages."""

import json

import numpy as np
import pytest
from test_run import configure

from b2diffurl.models import Models
from b2diffurl.noise import draw_prompts
from b2diffurl.prompt_weights import FLOOR, by_variance
from b2diffurl.stages import loop
from b2diffurl.stages.sample import image_rows


def test_a_tenth_of_the_draws_is_uniform():
    assert by_variance(["a", "b"], [{"a": [1, 1], "b": [0, 1]}]) == pytest.approx([0.05, 0.95])


def test_they_are_those_of_a_loop_over_the_definition():
    rng = np.random.default_rng(0)
    prompts = ["never", "once", "often", "solved"]
    history = [
        {"once": rng.normal(size=4).tolist(), "often": rng.normal(size=3).tolist(), "solved": [0, 1]},
        {"often": (3 * rng.normal(size=6)).tolist(), "solved": [1, 1, 1]},
    ]
    found = by_variance(prompts, history)
    latest = {"once": history[0]["once"], "often": history[1]["often"], "solved": history[1]["solved"]}
    spread = {name: sum((x - sum(own) / len(own)) ** 2 for x in own) / len(own) for name, own in latest.items()}
    spread["never"] = max(spread.values())
    for name, share in zip(prompts, found, strict=True):
        assert share == pytest.approx(FLOOR / 4 + (1 - FLOOR) * spread[name] / sum(spread.values()))
    assert found.sum() == pytest.approx(1)
    assert found[3] == pytest.approx(FLOOR / 4)  # what is solved is still looked at


@pytest.mark.parametrize("history", [[], [{"a": [1, 1], "b": [0, 0]}], [{"a": [1]}]])
def test_without_a_spread_it_is_uniform(history):
    assert by_variance(["a", "b"], history) == pytest.approx([0.5, 0.5])


def test_prompts_are_drawn_as_often_as_their_probabilities_say():
    wanted = np.array([0.7, 0.2, 0.1])
    drawn = draw_prompts(300, 1, 3, 90_000, wanted)
    assert np.bincount(drawn) / len(drawn) == pytest.approx(wanted, abs=0.006)  # four standard errors
    assert drawn == draw_prompts(300, 1, 3, 90_000, wanted)
    assert drawn != draw_prompts(300, 2, 3, 90_000, wanted)


@pytest.mark.usefixtures("elsewhere")
def test_a_later_stage_draws_what_still_varies(tmp_path, monkeypatch):
    """Only one prompt's rewards vary in stage 0: stage 1 draws it nearly always, and select agrees on the rows."""
    (tmp_path / "one.py").write_text(
        "def varies(images, prompts):\n"
        "    return [i * (p == 'a red circle') + (p == 'a red ring') for i, p in enumerate(prompts)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    prompts = ["a red circle", "a red ring", "a blue ring"]
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    settings = {
        "sample.prompt_weights": "variance", "reward.name": "one:varies", "sample.groups": 12, "sample.branches": 2,
        "prompts.train": tmp_path / "p.json", "select.credit": "group",
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    loaded = Models(configure(tmp_path, *flags))
    for stage in (0, 1):
        loop.run_stage(configure(tmp_path, f"--config.stage={stage}", *flags), loaded=loaded)
    first, second = (
        [row["prompt"] for row in json.loads((tmp_path / f"t/stage{stage}/samples.json").read_text())]
        for stage in (0, 1)
    )
    assert {*first} == {*prompts}
    assert second.count("a red circle") >= 20
    uniform = configure(tmp_path, "--config.stage=1", *flags[1:])
    assert [row["prompt"] for row in image_rows(uniform)] != second
