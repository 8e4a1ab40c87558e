"""The check of a GPU: every outcome is reported at once and the others go on; its code runs without a GPU too."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_distributed import alive

from b2diffurl.bench import __main__ as command
from b2diffurl.bench import densities, driver_checks, gpu_check, meter, rates
from b2diffurl.bench.gpu_check import Report

NO_GPU = "no CUDA device here: the same code at small size, on the CPU"


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def stored(folder):
    return {row["check"]: row for row in json.loads((folder / "gpu_check.json").read_text())["checks"]}


def test_one_failure_is_reported_and_the_others_go_on(tmp_path, capsys):
    report = Report(tmp_path / "out")

    def fails():
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    assert not report.check("first", 5, fails)
    assert stored(tmp_path / "out")["first"]["outcome"] == "FAILED"  # there before the next one begins
    assert report.check("second", 5, lambda: (["a line"], {"figure": 1}))
    assert report.check("third", 5, lambda: None)
    assert report.end() == 1
    rows = stored(tmp_path / "out")
    assert "illegal memory access" in rows["first"]["traceback"]
    assert rows["second"]["figures"] == {"figure": 1}
    assert [row["outcome"] for row in rows.values()] == ["FAILED", "passed", "passed"]
    said = capsys.readouterr().out
    assert said == (tmp_path / "out/gpu_check.txt").read_text()
    assert "FAILED  first, 0." in said
    assert "    RuntimeError: CUDA error: an illegal memory access\n    more\n" in said
    assert "2 passed, 1 failed, 0 skipped; 0.0 minutes" in said


def test_time_is_kept(tmp_path):
    report = Report(tmp_path)
    began = time.monotonic()
    assert not report.check("slow", 0.2, lambda: time.sleep(30))
    assert time.monotonic() - began < 10
    assert stored(tmp_path)["slow"]["lines"] == ["TimeoutError: stopped after 0 s"]
    report.began -= gpu_check.LIMIT - 60
    assert not report.check("late", 5, lambda: None)
    assert stored(tmp_path)["late"]["lines"] == ["22 minutes have passed"]
    assert report.end() == 1
    assert Report(tmp_path).end() == 0  # a new report begins afresh


@pytest.mark.slow
def test_the_same_code_without_a_gpu(elsewhere, capsys, without_gpu, monkeypatch):
    """All checks in this process and two runs of the driver; one check fails."""

    def fails(scratch):
        raise ValueError("more than rounding")

    monkeypatch.setattr(gpu_check, "several_processes", fails)
    assert gpu_check.main(elsewhere / "out") == 1
    rows = stored(elsewhere / "out")
    assert capsys.readouterr().out.splitlines()[0] == NO_GPU
    checks = ["memory", "largest batches", "throughput", "first pass", "updates"]
    assert [*rows] == [f"{p}: {check}" for p in ("bf16", "float32") for check in checks] + [
        "several processes", "D-Fusion run", "shapes run",
    ]  # fmt: skip
    wrong = {name: row["lines"] for name, row in rows.items() if row["outcome"] != "passed"}
    assert wrong == {"several processes": ["ValueError: more than rounding"]}
    assert len(rows["float32: first pass"]["figures"]["by_step"]) == 8
    assert len(rows["bf16: updates"]["figures"]["grad_norms"]) == 5
    assert {row["model"] for row in rows["shapes run"]["figures"]["results"]} == {"before", "after"}
    fused = rows["D-Fusion run"]["figures"]
    assert 0 < fused["mask_share"] < 1
    assert fused["ratio_first_error"] < 0.01
    assert not list(elsewhere.glob("log/*"))
    assert sorted(path.name for path in (elsewhere / "out").iterdir()) == ["gpu_check.json", "gpu_check.txt"]


def test_what_a_gpu_alone_is_asked(tmp_path, monkeypatch, without_gpu):
    """The lines that need a device, with a device's answers put in."""
    own = gpu_check.Precision(gpu_check.configure("bf16", pathlib.Path("x")), tmp_path / "lora")
    own.cuda = True
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3e9, 9.5e9))
    lines, figures = own.memory()
    assert all(line.endswith(" allocated, 6.05 GiB of the device used: not under 6 GB") for line in lines)
    assert figures["with"]["device_bytes"] == 6.5e9
    phase = {"per_s": 2.0, "flops_per_s": 3e12, "batch": 8, "unit": "images", "peak_bytes": 2**30}
    monkeypatch.setattr(rates, "measure_sampling", lambda *_: (dict(phase), None, []))
    monkeypatch.setattr(rates, "measure_training", lambda *_: dict(phase))
    monkeypatch.setattr(rates, "measure_scoring", lambda *_: dict(phase))
    monkeypatch.setattr(meter, "matmul_rate", lambda dtype, budget: 6e12)
    lines, figures = own.throughput()
    assert lines[:2] == ["matmul 6 TFLOP/s", rates.HEAD]
    assert lines[2].split() == ["sampling", "8", "2", "images/s", "3.000", "50%", "-", "1024", "MiB"]
    assert figures["phases"]["scoring"]["matmul_share"] == 0.5


def test_several_gpus_are_set_against_the_first(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(driver_checks, "drive", lambda scratch, name, settings, **given: asked.setdefault(name, given))
    monkeypatch.setattr(driver_checks, "outcome", lambda run: (np.zeros((1, 2, 2, 3), dtype=int), 1.0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    lines, _ = driver_checks.several_processes(tmp_path)
    assert asked == {"gpu_check_one": {"CUDA_VISIBLE_DEVICES": "3"}, "gpu_check_many": {}}
    assert lines[0].startswith("4 GPUs against one: pixels differ by at most 0 of 255")


def test_a_first_pass_that_is_off_fails(monkeypatch, without_gpu):
    """Not a crash: the figures say so, and at which steps."""
    figures = {"images": 2, "steps": 1, "steps_of_run": 20, "per_call": 2, "allowed": 0.1, "by_step": []}
    figures["by_step"].append({"t": 51, "ratio_error": 0.3, "prediction_error": 0.2})
    monkeypatch.setattr(densities, "first_pass", lambda *_: figures)
    monkeypatch.setattr(gpu_check.Precision, "loaded", None)
    own = gpu_check.Precision(gpu_check.configure("bf16", pathlib.Path("x")), None)
    with pytest.raises(ValueError, match=r"t=51: the prediction is off by 2\.0e-01"):
        own.first_pass()
    figures["by_step"][0]["prediction_error"] = 0.05
    assert own.first_pass()[1] is figures


@pytest.mark.parametrize(("pixel", "norm", "fine"), [(7, 2.0, True), (90, 2.0, False), (7, 2.1, False)])
def test_two_processes_may_differ_by_rounding_alone(tmp_path, monkeypatch, without_gpu, pixel, norm, fine):
    for name in ("gpu_check_one", "gpu_check_many"):
        other = name == "gpu_check_many"
        folder = tmp_path / name / "stage0/images"
        folder.mkdir(parents=True)
        values = np.full((32, 32, 3), 7, dtype=np.uint8)
        values[:4, :4] += (pixel - 7) * other
        Image.fromarray(values).save(folder / "00000.png")
        line = {"stage": 0, "step": "train", "train/grad_norm": norm if other else 2.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(driver_checks, "drive", lambda scratch, name, settings, **environment: scratch / name)
    if fine:
        assert driver_checks.several_processes(tmp_path)[1] == {"largest_pixel_difference": 0, "grad_norms": [2.0, 2.0]}
    else:
        with pytest.raises(ValueError, match="more than rounding: two processes on the CPU against one: pixels differ"):
            driver_checks.several_processes(tmp_path)


def test_a_driver_that_fails_or_hangs(tmp_path, monkeypatch):
    """Its last lines are the reason; and with a check's time all that it has started ends."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "run_process.sh"
    script.write_text('echo "$PRESET ${CUDA_VISIBLE_DEVICES-unset}"; echo run_train.py: it is broken >&2; exit 3')
    with pytest.raises(RuntimeError, match=r"run_process\.sh failed:\nshapes 1\nrun_train\.py: it is broken"):
        driver_checks.drive(tmp_path, "name", ("a=b",), CUDA_VISIBLE_DEVICES="1")
    script.write_text("sleep 60 & echo $! >child; wait")
    with pytest.raises(TimeoutError), meter.within(5):
        driver_checks.drive(tmp_path, "name", ())
    child = pathlib.Path("/proc", (tmp_path / "child").read_text().strip())
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (tmp_path / "name").mkdir()
    (tmp_path / "name/eval.json").touch()
    assert driver_checks.drive(tmp_path, "name", ()) == tmp_path / "name"  # what is there is not made again


def test_the_check_needs_a_folder(capsys):
    for arguments in (
        [],
        ["--out", "x", "--preset", "shapes"],
        ["--out", "x", "--quick"],
        ["--out", "x", "--config.seed=1"],
    ):
        with pytest.raises(SystemExit):
            command.run(["bench.py", "--gpu-check", *arguments])
        assert "--gpu-check takes --out DIR, and no preset or settings" in capsys.readouterr().err


@pytest.mark.slow
def test_the_check_as_a_user_runs_it(tmp_path):
    command = [sys.executable, "-m", "b2diffurl.bench", "--gpu-check", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == NO_GPU
    assert "two processes on the CPU against one: pixels differ by at most" in done.stdout
