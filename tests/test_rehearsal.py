"""The dress rehearsal: one stage of the paper's preset by its own scripts, with random weights."""

import json
import pathlib
import subprocess
import sys

import pytest
import tiny
import torch
from PIL import Image

from b2diffurl.bench import random_weights, rehearsal
from b2diffurl.errors import UserError
from b2diffurl.evaluate import before_after
from b2diffurl.run import metrics
from b2diffurl.run.command import parse
from b2diffurl.stages import sample, select, train

STEPS = ["weights", "sample", "select", "train", "evaluate"]


def check(folder, precision, resolution):
    """What a rehearsal leaves, and that its stage did what a stage does."""
    result = json.loads((folder / "rehearsal.json").read_text())
    assert result["precision"] == precision
    assert [step["step"] for step in result["steps"]] == STEPS
    assert all(step["seconds"] > 0 and step["peak_bytes"] > 1e8 for step in result["steps"])
    lines = {line["step"]: line for line in metrics.read(folder / "run/metrics.jsonl")}
    assert lines["sample"]["sample/images"] == 4
    assert lines["sample"]["perf/unet_evals"] == 2 * (2 * 2 + 4 * 2)
    assert lines["select"]["select/kept"] == 2
    assert lines["train"]["train/updates"] == 1
    assert lines["train"]["policy/prediction_error"] == result["prediction_error"] < 0.5
    assert {row["model"] for row in json.loads((folder / "run/eval.json").read_text())["results"]} == {
        "before",
        "after",
    }
    assert Image.open(folder / "run/stage0/images/00003.png").size == (resolution, resolution)
    assert not list(folder.glob("tmp*"))  # the weights


def in_process(name, arguments, out):
    """What run_step starts, in this process: the same arguments to the same functions."""
    if name == "weights":
        assert arguments[:2] == ["-m", "b2diffurl.bench.random_weights"]
        random_weights.write(*arguments[2:5], json.loads(arguments[5]))
    elif name == "evaluate":
        assert arguments[:2] == ["-m", "b2diffurl.evaluate"]
        config, given = parse(arguments[1:], {"checkpoint": None, "out": None})
        before_after.main(config, **given)
    else:
        assert pathlib.Path(arguments[0]) == rehearsal.ROOT / f"run_{name}.py"
        {"sample": sample, "select": select, "train": train}[name].main(parse(arguments)[0])
    return {"step": name, "seconds": 1.0, "peak_bytes": 2**30, "gpu_bytes": None}


def test_a_stage_of_the_papers_preset(elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(rehearsal, "run_step", in_process)
    rehearsal.main("out", "bf16", tiny.CLIP, tiny.GEOMETRY)
    check(elsewhere / "out", "bf16", 16)
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("stage 0")]
    assert said[0] == f"random weights in bf16, reward {tiny.CLIP}"
    assert said[2] == "weights        1.0      1.00 GiB            -"
    assert said[3] == "sample         1.0      1.00 GiB            -"
    with pytest.raises(UserError, match="out/run is there already"):
        rehearsal.main("out", "bf16", tiny.CLIP, tiny.GEOMETRY)
    assert any(line.startswith("one update; before it the prediction was off by ") for line in said)


def test_a_step_has_its_time_and_memory(tmp_path, monkeypatch):
    """300 MB and half a second, in the folder, with the library, and nothing from the hub."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    code = "import os, time, b2diffurl; assert os.environ['HF_HUB_OFFLINE'] == '1'; x = b'1' * 300_000_000; "
    code += "open('there', 'w').close(); time.sleep(0.5)"
    step = rehearsal.run_step("sample", ["-c", code], tmp_path)
    assert (tmp_path / "there").exists()
    assert step["step"] == "sample"
    assert step["seconds"] >= 0.5
    assert step["peak_bytes"] > 3e8


def test_a_step_that_fails_is_named_with_its_last_line(tmp_path):
    with pytest.raises(UserError, match=r"^train failed: the last line$"):
        rehearsal.run_step("train", ["-c", "import sys; sys.exit('a line\\nthe last line')"], tmp_path)
    with pytest.raises(UserError, match=r"^train failed: exit status -9$"):
        rehearsal.run_step("train", ["-c", "import os; os.kill(os.getpid(), 9)"], tmp_path)


def test_memory_that_is_not_there_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "weights").write_bytes(b"1" * 1000)
    rehearsal.require_memory(tmp_path, "no", tiny.GEOMETRY)
    monkeypatch.setattr(rehearsal, "LIBRARIES", 1e15)
    with pytest.raises(UserError, match=r"^1000000\.0 GB of memory are needed, \d+\.\d GB are free$"):
        rehearsal.require_memory(tmp_path, "no", tiny.GEOMETRY)


def test_the_precision_is_what_the_machine_computes_in(monkeypatch):
    for cuda, known, wanted in ((True, "", "fp16"), (False, "fpu amx_bf16", "bf16"), (False, "fpu avx2", "no")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(pathlib.Path, "read_text", lambda path, encoding, known=known: f"flags : {known}\n")
        assert rehearsal.default_precision() == wanted


@pytest.mark.slow
def test_sd_at_full_resolution(tmp_path):
    command = [sys.executable, "-m", "b2diffurl.bench.rehearsal", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    check(tmp_path, rehearsal.default_precision(), 512)
