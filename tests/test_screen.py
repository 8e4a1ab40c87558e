"""The screening: balanced columns, effects against planted ones, and what was published."""

import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from b2diffurl.errors import UserError
from b2diffurl.plan import queries
from b2diffurl.run import lock
from b2diffurl.run.folder import flat
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


def test_level_0_is_the_arm_and_the_tasks_have_masks_of_their_own(whole, tmp_path):
    settings = {name: value for own, _ in screen.FACTORS.values() for name, value in own.items()}
    trials = [screen.Trial("dark", "b2_lean", 1, own, search=True) for own in (tuple(settings.items()), ())]
    ours, arm = (flat(benchmark.configure(trial, tmp_path, screen.DESIGN)) for trial in trials)
    assert ours == arm
    assert {trial.arm for _, trial in whole} == {"b2_lean"}
    assert [trial.seed for _, trial in whole] != sorted(trial.seed for _, trial in whole)
    hidden = {}  # (two settings, the third one that their common effect falls on): the tasks where it does
    for task in screen.DESIGN.tasks:
        own = [levels for levels, trial in whole if trial.task == task]
        columns = {name: tuple(levels[name] for levels in own) for name in screen.FACTORS}
        third = {column: name for name, column in columns.items()}
        third |= {tuple(1 - value for value in column): name for column, name in third.items()}
        for a, b in itertools.combinations(columns, 2):
            both = tuple(x ^ y for x, y in zip(columns[a], columns[b], strict=True))
            if both in third:
                hidden.setdefault((a, b, third[both]), []).append(task)
    assert hidden
    assert {len(tasks) for tasks in hidden.values()} == {1}


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
    found = screen.effects(rows, "diversity_train", by_slope=True)
    assert found["clip"][0] == pytest.approx(0.4, abs=4 * found["clip"][1])
    assert screen.effects(rows, "diversity_train")["clip"][1] > 5 * found["clip"][1]  # success left out is noise
    assert "| {:+.4f} ± {:.4f} |".format(*found["clip"]) in screen.text(rows)


def test_the_standard_errors_are_those_of_the_noise(whole):
    few = whole[:40]  # of 20 unknowns: a wrong number of degrees of freedom would be off by a third and more
    known = [
        [*(trial.task == task for task in screen.DESIGN.tasks), *(levels[name] for name in screen.FACTORS)]
        for levels, trial in few
    ]
    matrix = np.array(known, dtype=float)
    variances = 0.1**2 * np.linalg.inv(matrix.T @ matrix).diagonal()[-len(screen.FACTORS) :]
    rng, squares = np.random.default_rng(2), []
    for _ in range(400):
        rows = [{"task": trial.task, **levels, "y": 0.1 * rng.normal()} for levels, trial in few]
        squares.append([error**2 for _, error in screen.effects(rows, "y").values()])
    assert np.mean(squares, 0) == pytest.approx(variances, rel=0.08)  # 20 degrees over 400: ± 0.016


def test_an_effect_of_all_runs_is_the_difference_of_two_halves(whole):
    rng = np.random.default_rng(1)
    rows = [{"task": trial.task, **levels, "y": rng.normal()} for levels, trial in whole]
    for name, (effect, _) in screen.effects(rows, "y").items():
        halves = [np.array([row["y"] for row in rows if row[name] == level]) for level in (0, 1)]
        assert effect == pytest.approx(halves[1].mean() - halves[0].mean())


def test_too_few_runs_have_no_effects(whole):
    rows = planted(whole, 0.4)
    alike = [row for row in rows if row["kl"]]
    for own in (rows[:20], alike):
        with pytest.raises(UserError, match=f"{len(own)} runs are too few to tell 16 settings apart"):
            screen.effects(own, "success_test")
    failed = {"task": "dark", "seed": 9, "failed": "nothing to learn"}
    said = "runs are too few to tell 16 settings apart.\n\nFailed: dark 9 nothing to learn\n"
    assert screen.text([*rows[:3], failed]) == f"3 {said}"
    assert screen.text([failed]) == f"0 {said}"


def test_the_published_runs_are_the_plans():
    rows = screen.stored(PUBLISHED / "screen.csv")
    assert screen.unfinished(rows, PUBLISHED) == []
    assert screen.text(rows) == (PUBLISHED / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [{"seed": 9999}, {"kl": 0.5}, {"task": "other"}, {"rank": None}], ids=str)
def test_rows_of_another_plan_are_refused(change):
    rows = screen.stored(PUBLISHED / "screen.csv")
    with pytest.raises(UserError, match="is not this plan's; give another --out"):
        screen.unfinished([*rows[:4], {**rows[4], **change}], PUBLISHED)
    with pytest.raises(UserError, match="is not this plan's"):
        screen.unfinished([rows[0], rows[0]], PUBLISHED)


def test_it_goes_on_and_a_failed_run_is_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(screen, "STARTED", 90)
    monkeypatch.setattr(screen.lock, "hold", lambda folder: None)
    planned, ran = [trial.seed for _, trial in screen.plan()], []

    def each(trials, run):
        for trial in trials:
            ran.append(trial.seed)
            if len(ran) == 41:
                raise KeyboardInterrupt
            ends = {"success_test": trial.seed % 7, "success_train": trial.seed % 5, "diversity_train": trial.seed % 3}
            failed = UserError("nothing to learn") if len(ran) == 43 else None
            yield trial, failed or [{"stage": 0}, {"stage": 5, "forwards": 1, "updates": 9, **ends}]

    monkeypatch.setattr(screen, "each", each)
    with pytest.raises(KeyboardInterrupt):
        screen.main(tmp_path)
    assert len(screen.stored(tmp_path / "screen.csv")) == 40
    assert (tmp_path / "table.md").read_text(encoding="utf-8").startswith("40 runs.")
    with pytest.raises(UserError, match=f"1 of 50 runs failed: .* b2_lean {planned[41]}: nothing to learn"):
        screen.main(tmp_path)
    assert ran == [*planned[:41], *planned[40:]]  # the one that was interrupted again
    rows = screen.stored(tmp_path / "screen.csv")
    assert [row["seed"] for row in rows] == sorted(planned)
    assert [row["seed"] for row in rows if "failed" in row] == [planned[41]]
    assert (tmp_path / "table.md").read_text(encoding="utf-8").startswith("89 runs.")
    capsys.readouterr()
    screen.main(tmp_path)  # nothing is left
    assert len(ran) == 91
    assert capsys.readouterr().out.startswith("89 runs.")


def test_a_run_by_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(screen, "STARTED", 1)
    monkeypatch.setattr(screen.lock, "hold", lambda folder: None)
    monkeypatch.setattr(screen, "each", lambda trials, run: [(trial, run(trial)) for trial in trials])
    tasks = {name: task._replace(images=2) for name, task in screen.DESIGN.tasks.items()}
    monkeypatch.setattr(screen, "DESIGN", screen.DESIGN._replace(tasks=tasks, less={"b2_lean": 120}, every=120))
    screen.main(tmp_path)
    (row,) = screen.stored(tmp_path / "screen.csv")
    assert row["forwards"] > 120 * 10
    assert 0 <= row["success_test"] <= 1
    assert len([*(tmp_path / "runs").glob("*/stage0/evaluation.json")]) == 1
    assert "\n1/1 " in capsys.readouterr().out


def test_it_is_evaluated_at_its_end_alone():
    assert screen.DESIGN.every == screen.DESIGN.less["b2_lean"] == 720


def test_what_no_run_would_find_is_refused_at_once(tmp_path):
    command = [sys.executable, "-m", "b2diffurl.study.screen", "--out"]
    for name in ("config", "prompts", "b2diffurl"):
        (tmp_path / name).symlink_to(pathlib.Path.cwd() / name)
    (tmp_path / "file").touch()
    held = tmp_path / "held"
    lock.hold(held)
    for out, said in (("out", "model/shapes"), ("file", "file cannot be made"), ("held", "held is in use")):
        done = subprocess.run([*command, out], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr[:8]) == (1, "screen: ")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / out / "screen.csv").exists()
