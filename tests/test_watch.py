"""A reward that rises alone is told, one that rises with the oracle or by chance is not; one that stays ends a run."""

import logging

import numpy as np
import pytest

from b2diffurl.run import metrics
from b2diffurl.run.command import parse
from b2diffurl.run.folder import Run
from b2diffurl.stages import loop, plateau
from b2diffurl.stages.select import _warn
from b2diffurl.watch import WINDOW, level, parted

RISING = [0.5, 0.52, 0.49, 0.51, 0.7, 0.72, 0.69, 0.71]
LEVEL = [0.6, 0.62, 0.59, 0.61, 0.6, 0.61, 0.59, 0.6]


def test_only_what_does_not_rise_is_named():
    assert parted(RISING, {"oracle": LEVEL, "other": RISING}) == ["oracle"]
    assert parted([*LEVEL, *RISING], {"oracle": [*RISING, *LEVEL]}) == ["oracle"]  # the last stages count
    assert parted(LEVEL, {"oracle": RISING[::-1]}) == []
    assert parted(RISING[1:], {"oracle": LEVEL[1:]}) == []  # too few stages
    assert parted(RISING, {"oracle": LEVEL[1:]}) == []  # not of the same stages


def test_level_is_where_no_window_is_above_the_one_before():
    assert level(LEVEL, 4)
    assert level([1, 1, 1, 1], 2)
    assert not level(RISING, 4)
    assert not level([*RISING, 0.71], 5)  # too few
    assert not level(LEVEL, 0)
    assert level([0, 0, 0, 3, 2, 2, 1], 2)  # the last four count


def plateau_run(folder, *more):
    flags = ("method=ddpo", "schedule.stage_count=6", "schedule.plateau=1", f"save_path={folder}", "exp_name=t", *more)
    return parse(["x", "--config", "config/stage_process.py:shapes", *(f"--config.{flag}" for flag in flags)])[0]


@pytest.mark.usefixtures("elsewhere")
def test_a_run_ends_at_a_plateau_and_evaluates_what_it_has(tmp_path, monkeypatch, capsys):
    """Rewards 1, 2, 2: the stage after them is not begun, by the loop nor by the script's question."""
    evaluated, rewards, trained = [], [1.0, 2.0, 2.0, 9.0, 9.0, 9.0], []

    def run_stage(config, *_):
        run = Run(config)
        run.checkpoint.mkdir(parents=True, exist_ok=True)
        (run.checkpoint / "pytorch_lora_weights.safetensors").touch()
        trained.append(config.stage)
        metrics.record(run.metrics, config, "select", {"reward/mean": rewards[config.stage]})

    monkeypatch.setattr(loop, "run_stage", run_stage)
    monkeypatch.setattr(loop.before_after, "main", lambda config, checkpoint, *_, **__: evaluated.append(checkpoint))
    monkeypatch.setattr(loop.page, "main", lambda folder: None)
    for _ in range(2):
        loop.main(plateau_run(tmp_path))
        assert "stage 3 is not begun: the reward has not risen over the last 2 stages" in capsys.readouterr().out
    assert evaluated == [tmp_path / "t/stage2/checkpoints/checkpoint_1"] * 2
    for stage, said in ((2, ""), (3, "plateau\n")):
        plateau.main(plateau_run(tmp_path, f"stage={stage}"))
        assert capsys.readouterr().out == said
    loop.main(plateau_run(tmp_path, "schedule.plateau=0"))  # the setting may change: the run goes on
    loop.main(plateau_run(tmp_path))  # and what is complete stays
    assert evaluated[2:] == [tmp_path / "t/stage5/checkpoints/checkpoint_1"] * 2
    assert trained == [0, 1, 2, 3, 4, 5]
    (tmp_path / "t/stage4/checkpoints/checkpoint_1/pytorch_lora_weights.safetensors").unlink()
    loop.main(plateau_run(tmp_path))
    assert trained[6:] == [4]  # a stage that lost its LoRA is not complete


@pytest.mark.parametrize(("rise", "told"), [(2.03, ["o"]), (1.97, [])])
def test_clear_is_two_standard_errors(rise, told):
    before = np.array([0.0, 1.0, 2.0, 3.0])
    error = np.sqrt(2 * before.var(ddof=1) / 4)
    assert parted([*before, *(before + rise * error)], {"o": LEVEL}) == told


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
    falling = [{**line, "oracle/alignment": 0.97 - 0.05 * line["stage"]} for line in records]
    _warn(config, falling, logging.getLogger("test"))
    assert "and oracle/alignment has not" in caplog.text
    caplog.clear()
    config.stage = 6  # as far as then
    _warn(config, records, logging.getLogger("test"))
    assert not caplog.text
