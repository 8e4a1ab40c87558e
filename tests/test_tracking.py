"""One tracked run per experiment, by the real trackers (trackio where it is installed); a failure costs a warning."""

import json
import logging
import os
import re
import sqlite3
import subprocess
import sys

import pytest
from PIL import Image

from b2diffurl.run import tracking
from b2diffurl.run.command import parse

STEP = """
import logging
from PIL import Image
from b2diffurl.run.command import parse
from b2diffurl.run.tracking import track

flags = ["--config.log_with=wandb", "--config.exp_name=mine"]
config = parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]
images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
track(config, "sample", {"perf/images_per_s": 2.0, "time_s": 1.0}, logging.getLogger())
track(config, "select", {"reward/mean": 0.25, "time_s": 3.0}, logging.getLogger(), images)
"""


def test_every_process_continues_the_experiments_run_and_sends_its_pictures(tmp_path):
    (tmp_path / "log").mkdir()
    for name in ("config", "model", "prompts"):
        (tmp_path / name).symlink_to(os.path.abspath(name))
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": os.getcwd()}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", STEP], cwd=tmp_path, env=environment, check=True, capture_output=True)
    runs = sorted((tmp_path / "log/wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({next(run.glob("*.wandb")).name for run in runs}) == 1
    for run in runs:
        stored = next(run.glob("*.wandb"))
        assert re.fullmatch(r"run-mine-[0-9a-f]{8}\.wandb", stored.name)
        data = stored.read_bytes()  # protocol buffers, uncompressed
        for name in (b"reward/mean", b"sample/perf/images_per_s", b"sample/time_s", b"select/time_s", b"b2diffurl"):
            assert name in data
        assert len(list(run.glob("files/media/images/**/*.png"))) == 2


def test_tensorboard_has_the_figures_by_stage_and_the_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "log").mkdir()
    for name in ("config", "model", "prompts"):
        (tmp_path / name).symlink_to(os.path.abspath(name))
    for stage in ("", "config.stage = 1\n"):
        code = STEP.replace("wandb", "tensorboard").replace("images = [", f"{stage}images = [")
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    (folder,) = (tmp_path / "log/tensorboard").glob("mine-*")
    found = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [(event.step, event.value) for event in found.Scalars("reward/mean")] == [(0, 0.25), (1, 0.25)]
    assert {"sample/perf/images_per_s", "sample/time_s", "select/time_s"} <= {*found.Tags()["scalars"]}
    assert [event.step for event in found.Images("select/images")] == [0, 1]


def test_trackio_goes_on_with_one_run_of_figures_settings_and_pictures(tmp_path):
    pytest.importorskip("trackio", reason="trackio wants an older Pillow than requirements.lock has")
    (tmp_path / "log").mkdir()
    for name in ("config", "model", "prompts"):
        (tmp_path / name).symlink_to(os.path.abspath(name))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), os.getcwd()])}
    environment.pop("TRACKIO_DIR", None)
    for stage in ("", "config.stage = 1\n"):
        code = STEP.replace("wandb", "trackio").replace("images = [", f"{stage}images = [")
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    database = sqlite3.connect(tmp_path / "log/trackio/b2diffurl.db")
    lines = [json.loads(own) for (own,) in database.execute("select metrics from metrics order by step")]
    assert [line["reward/mean"] for line in lines if "reward/mean" in line] == [0.25, 0.25]
    assert [line["stage"] for line in lines if "sample/time_s" in line] == [0, 1]
    assert sum("select/images/1" in line for line in lines) == 2
    assert len([*(tmp_path / "log/trackio/media").rglob("*.png")]) == 4
    ((settings,),) = database.execute("select config from configs")
    assert json.loads(settings)["method"] == "b2"


@pytest.fixture
def config():
    made = parse(["x", "--config", "config/stage_process.py:shapes", "--config.stage=3"])[0]
    made.log_with = "not_a_tracker"
    return made


def test_a_tracker_that_is_missing_is_a_warning(config, caplog):
    tracking.track(config, "train", {}, logging.getLogger("test"), [Image.new("RGB", (2, 2))])
    assert "not sent to not_a_tracker (not_a_tracker is not installed)" in caplog.text
    config.log_with = ""
    caplog.clear()
    tracking.track(config, "train", {}, logging.getLogger("test"))
    assert caplog.text == ""


def test_a_tracker_that_fails_is_a_warning(config, caplog, monkeypatch):
    config.log_with = "wandb"

    def fail(*args):
        raise ConnectionError("no route")

    monkeypatch.setattr(tracking, "_tracker", fail)
    tracking.track(config, "train", {"train/loss": 1.0}, logging.getLogger("test"))
    assert "stage 3 train: not sent to wandb (no route)" in caplog.text
