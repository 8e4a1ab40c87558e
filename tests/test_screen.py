"""The screening: balanced columns, effects against planted ones, and what was published."""

import itertools
import pathlib

import numpy as np
import pytest

from b2diffurl.errors import UserError
from b2diffurl.plan import queries
from b2diffurl.study import benchmark, screen

PUBLISHED = pathlib.Path("docs/benchmark/screen")


@pytest.fixture
def whole(monkeypatch):
    """The plan with all of its runs."""
    monkeypatch.setattr(screen, "STARTED", len(screen.DESIGN.tasks) * screen.RUNS)
    return screen.plan()


def test_every_two_settings_meet_as_often_as_they_miss_each_other(whole):
    assert len(whole) == 256
    for task in screen.DESIGN.tasks:
        own = [levels for levels, trial in whole if trial.task == task]
        for a, b in itertools.combinations(screen.FACTORS, 2):
            met = np.bincount([2 * levels[a] + levels[b] for levels in own], minlength=4)
            assert met.tolist() == [16] * 4, (task, a, b)


def test_every_run_can_be_configured(whole, tmp_path):
    names = set()
    for levels, trial in whole:
        config = benchmark.configure(trial, tmp_path, screen.DESIGN)
        assert (config.schedule.stage_count, queries(config)) == (6, 120)
        assert config.schedule.untrained == (6 if levels["untrained"] else 10)
        assert config.train.kl_weight == (0.02 if levels["kl"] else 0.1)
        assert (config.evaluate.guidance_scale or config.sample.guidance_scale) == 5
        assert "shapes_search_test" in config.prompts.test
        names.add(config.exp_name)
    assert len(names) == len(whole)


def planted(whole, effect):
    rng = np.random.default_rng(0)
    return [
        {
            "task": trial.task, **levels, "success_train": (train := rng.normal()),
            "success_test": len(trial.task) + 0.3 * levels["kl"] - 0.2 * levels["rank"],
            "diversity_train": len(trial.task) * train + effect * levels["clip"] + 0.1 * rng.normal(),
        }
        for levels, trial in whole
    ]  # fmt: skip


def test_effects_are_the_planted_ones(whole):
    rows = planted(whole, 0.4)
    found = screen.effects(rows, "success_test")
    for name in screen.FACTORS:
        assert found[name][0] == pytest.approx({"kl": 0.3, "rank": -0.2}.get(name, 0), abs=1e-9)
    found = screen.effects(rows, "diversity_train", equal_success=True)
    assert found["clip"][0] == pytest.approx(0.4, abs=4 * found["clip"][1])
    assert found["clip"][1] == pytest.approx(2 * 0.1 / np.sqrt(len(rows)), rel=0.15)
    assert screen.effects(rows, "diversity_train")["clip"][1] > 5 * found["clip"][1]  # success left out is noise


def test_an_effect_of_all_runs_is_the_difference_of_two_halves(whole):
    rng = np.random.default_rng(1)
    rows = [{"task": trial.task, **levels, "y": rng.normal()} for levels, trial in whole]
    for name, (effect, error) in screen.effects(rows, "y").items():
        halves = [np.array([row["y"] for row in rows if row[name] == level]) for level in (0, 1)]
        assert effect == pytest.approx(halves[1].mean() - halves[0].mean())
        assert error == pytest.approx(2 / np.sqrt(len(rows)), rel=0.15)


def test_the_published_runs_are_the_plans():
    rows, planned = screen.stored(PUBLISHED / "screen.csv"), {trial.seed: own for own, trial in screen.plan()}
    assert {row["seed"]: {name: row[name] for name in screen.FACTORS} for row in rows} == planned
    assert screen.text(rows) == (PUBLISHED / "table.md").read_text(encoding="utf-8")


def test_it_goes_on_and_a_failed_run_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(screen, "STARTED", 90)
    ran = []

    def each(trials, run):
        for trial in trials[: 90 if ran else 40]:
            ran.append(trial.seed)
            ends = {"success_test": trial.seed % 7, "success_train": trial.seed % 5, "diversity_train": trial.seed % 3}
            failed = UserError("nothing to learn") if len(ran) == 3 else None
            yield trial, failed or [{"stage": 0}, {"stage": 5, "forwards": 1, "updates": 9, **ends}]

    monkeypatch.setattr(screen, "each", each)
    monkeypatch.setattr(screen.lock, "hold", lambda folder: None)
    screen.main(tmp_path)
    screen.main(tmp_path)
    assert sorted(ran) == sorted(trial.seed for _, trial in screen.plan())
    rows = screen.stored(tmp_path / "screen.csv")
    assert len(rows) == 90
    (failed,) = [row for row in rows if "failed" in row]
    assert (failed["seed"], failed["failed"]) == (ran[2], "nothing to learn")
    said = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert said.startswith("89 runs.")
    assert f"{failed['seed']} nothing to learn" in said
