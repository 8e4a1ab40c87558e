"""metrics.jsonl keeps one line a (stage, step); a tracker's failure costs a warning."""

import logging
import sys
import types

import ml_collections
import pytest

from b2diffurl import metrics


@pytest.fixture
def config():
    return ml_collections.ConfigDict({"stage": 3, "exp_name": "run", "log_with": "wandb"})


def test_a_repeated_step_replaces_its_line(tmp_path, config):
    path = tmp_path / "metrics.jsonl"
    assert metrics.read(path) == []
    metrics.record(path, config, "sample", {"time_s": 1.0})
    metrics.record(path, config, "select", {"time_s": 2.0})
    metrics.record(path, config, "sample", {"time_s": 3.0})
    assert metrics.read(path) == [
        {"stage": 3, "step": "select", "time_s": 2.0},
        {"stage": 3, "step": "sample", "time_s": 3.0},
    ]
    with pytest.raises(ValueError, match="JSON"):
        metrics.record(path, config, "train", {"train/loss": float("nan")})
    assert len(metrics.read(path)) == 2


def test_one_tracked_run_per_experiment(monkeypatch, config):
    seen = []
    run = types.SimpleNamespace(log=seen.append, finish=lambda quiet: seen.append("finished"))
    wandb = types.SimpleNamespace(init=lambda **options: seen.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    metrics.track(config, "train", {"train/loss": 0.5}, logging.getLogger("test"))
    assert (seen[0]["id"], seen[0]["resume"]) == ("run", "allow")
    assert seen[1:] == [{"stage": 3, "step": "train", "train/loss": 0.5}, "finished"]


def test_a_tracker_that_fails_is_a_warning(monkeypatch, config, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    metrics.track(config, "train", {}, logging.getLogger("test"))
    assert "not sent to wandb" in caplog.text
    config.log_with = ""
    caplog.clear()
    metrics.track(config, "train", {}, logging.getLogger("test"))
    assert caplog.text == ""
