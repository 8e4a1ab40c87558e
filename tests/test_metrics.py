"""metrics.jsonl keeps one line a (stage, step)."""

import ml_collections
import pytest

from b2diffurl.run import metrics


@pytest.fixture
def config():
    return ml_collections.ConfigDict({"stage": 3, "exp_name": "run"})


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
