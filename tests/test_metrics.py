"""metrics.jsonl keeps one line a (stage, step)."""

import pathlib
import re

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


def test_the_time_left_is_that_of_the_mean_stage(tmp_path, config):
    config.schedule = {"stage_count": 6}
    for config.stage in (0, 1):
        for step, seconds in (("sample", 10.0), ("train", 20.0 + 40 * config.stage)):
            metrics.record(tmp_path / "metrics.jsonl", config, step, {"time_s": seconds})
    path = tmp_path / "metrics.jsonl"
    assert metrics.time_left(path, config, "train", ["sample", "train"]) == "; 3 min to the evaluation"  # 4 x 50 s
    assert metrics.time_left(path, config, "sample", ["sample", "train"]) == "; 4 min to the evaluation"  # and 40 s
    assert metrics.time_left(path, config, "sample", ["sample", "select", "train"]) == ""
    config.stage = 5
    assert metrics.time_left(path, config, "train", ["sample", "train"]) == "; 0 s to the evaluation"


def test_every_key_is_explained():
    """docs/runs.md has the keys that the steps' code names, and no others."""
    code = "".join(path.read_text() for path in pathlib.Path("b2diffurl/stages").glob("*.py"))
    named = set(re.findall(r'"((?:sample|select|fuse|train|policy|perf|reward|interval|oracle|diversity)/\w+)"', code))
    named |= {
        "stage",
        "step",
        "time_s",
        "reward/NAME",
        *(f"policy/{n}" for n in ("kl_pretrained", "preferred", "base_clipped")),
    }
    named |= {f"fuse/{side}_oracle" for side in ("reference", "base", "target")}
    named |= {f"train/updates_by_{unit}" for unit in ("epoch", "stage")}
    page = pathlib.Path("docs/runs.md").read_text().partition("## Glossary")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(.+?)`", " ".join(rows))) == sorted(named)
