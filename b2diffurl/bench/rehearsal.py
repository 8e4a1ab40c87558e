"""A dress rehearsal of the paper's run at full resolution: one stage of PRESET=sdv1.4, the smallest that there is.

`python -m b2diffurl.bench.rehearsal --out DIR [--precision bf16|fp16|no] [--architecture NAME]` runs its steps, and an
evaluation, as scripts of their own, on SD v1.4's geometry and an OpenCLIP reward with random weights; nothing is
downloaded. How long each took and how much memory it had is printed and left in DIR/rehearsal.json, beside the run's
files in DIR/run. What breaks here would break with the real weights.
"""

import argparse
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import torch

from ..errors import UserError
from ..families.loading import DTYPES
from ..run import metrics, storage
from ..run.folder import versions
from . import meter, random_weights

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = {"train": ["a cat washing dishes"], "test": ["a cat riding a bike"]}
SETTINGS = (
    "exp_name=run", "schedule.stage_count=1", "schedule.left=3", "schedule.right=3", "sample.num_steps=4",
    "sample.groups=2", "sample.branches=2", "sample.batch_size=2", "reward.weights=", "reward.batch_size=2",
    "select.pos_threshold=-9", "select.neg_threshold=-9",  # the best of each group
    "train.batch_size=1", "train.num_epochs=1", "train.trajectories_per_update=2", "evaluate.images_per_prompt=1",
    "evaluate.lpips=False", "evaluate.inception_score=False",  # their weights are downloads
)  # fmt: skip
LIBRARIES, WORK = 1e9, 1.6e9  # bytes of memory beside the weights; WORK for each byte of a number, at SD's size


def main(out, precision, architecture, geometry=random_weights.GEOMETRY):
    """Rehearse in the folder `out`. Raises UserError where there is no room, or where a step fails or makes nothing."""
    out = pathlib.Path(out).resolve()
    if (out / "run").exists():
        raise UserError(f"{out / 'run'} is there already: give another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    print(f"random weights in {precision.replace('no', 'float32')}, reward {architecture}", flush=True)
    print("step       seconds   peak memory   GPU in use", flush=True)
    with tempfile.TemporaryDirectory(dir=out) as weights:
        weights, steps = pathlib.Path(weights), []
        for name, prompts in PROMPTS.items():
            (weights / f"{name}.json").write_text(json.dumps(prompts), encoding="utf-8")
        made = ["-m", "b2diffurl.bench.random_weights", f"{weights}", precision, architecture, json.dumps(geometry)]
        for name, arguments in {"weights": made, **stage_steps(out, weights, precision)}.items():
            steps.append(run_step(name, arguments, out))
            print(row(steps[-1]), flush=True)
            if name == "weights":
                require_memory(weights, precision, geometry)
    trained = next(line for line in metrics.read(out / "run/metrics.jsonl") if line["step"] == "train")
    if not trained["train/updates"]:
        raise UserError("the stage made no update")
    figures = {name: trained[f"policy/{name}"] for name in ("prediction_error", "ratio_first_error")}
    storage.write_json(out / "rehearsal.json", {
        "date": str(datetime.date.today()), "machine": meter.machine(), "versions": versions(),
        "precision": precision, "architecture": architecture, "steps": steps, **figures,
    })  # fmt: skip
    print(
        f"one update; before it the prediction was off by {figures['prediction_error']:.1e} standard deviations, "
        f"|ratio - 1| at most {figures['ratio_first_error']:.1e}\n{meter.machine()}"
    )


def default_precision():
    """fp16 on a GPU; on a CPU bf16 where it has instructions for that, else "no": float32."""
    if torch.cuda.is_available():
        return "fp16"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    known = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    return "bf16" if {"avx512_bf16", "amx_bf16"} & {*known} else "no"


def require_memory(weights, precision, geometry):
    """Raise UserError where a machine without a GPU has no memory for the work with the files below `weights`."""
    meminfo = pathlib.Path("/proc/meminfo")
    if torch.cuda.is_available() or not meminfo.exists():
        return
    stored = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    pixels = (geometry["vae"]["sample_size"] / random_weights.VAE["sample_size"]) ** 2  # as a share of SD's
    wanted = stored + LIBRARIES + WORK * pixels * DTYPES[precision].itemsize
    there = 1024 * int(meminfo.read_text(encoding="ascii").partition("MemAvailable:")[2].split()[0])
    if there < wanted:
        raise UserError(f"{wanted / 1e9:.1f} GB of memory are needed, {there / 1e9:.1f} GB are free")


def stage_steps(out, weights, precision):
    """{step: arguments for Python}: the three scripts of stage 0, and the evaluation."""
    settings = (
        *SETTINGS, f"save_path={out}", f"mixed_precision={precision}", f"pretrained.model={weights / 'pipeline'}",
        f"reward.model=local-dir:{weights / 'clip'}", f"prompts.train={weights / 'train.json'}",
        f"prompts.test={weights / 'test.json'}",
    )  # fmt: skip
    flags = ["--config", f"{ROOT}/config/stage_process.py:sdv1.4", *(f"--config.{setting}" for setting in settings)]
    run = out / "run"
    checkpoint = f"{run}/stage0/checkpoints/checkpoint_1"
    return {
        **{step: [f"{ROOT}/run_{step}.py", *flags] for step in ("sample", "select", "train")},
        "evaluate": ["-m", "b2diffurl.evaluate", *flags, f"--checkpoint={checkpoint}", f"--out={run}"],
    }


def run_step(name, arguments, out):
    """Run Python in the folder `out` -> {step, seconds, peak_bytes, gpu_bytes}.

    peak_bytes: the most resident memory. gpu_bytes: the most of the GPU in use by all processes, asked of nvidia-smi
    every half second; None without a GPU. Raises UserError with the last line of stderr where it fails.
    """
    environment = {**os.environ, "PYTHONPATH": os.fspath(ROOT), "HF_HUB_OFFLINE": "1"}
    cuda, began, gpu = torch.cuda.is_available(), time.perf_counter(), None
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=out, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            while not (ended := os.wait4(process.pid, os.WNOHANG if cuda else 0))[0]:
                gpu = max(gpu or 0, gpu_bytes())
                time.sleep(0.5)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit status {process.returncode}"]
            raise UserError(f"{name} failed: {said[-1]}")
    seconds = round(time.perf_counter() - began, 1)
    return {"step": name, "seconds": seconds, "peak_bytes": 1024 * ended[2].ru_maxrss, "gpu_bytes": gpu}


def gpu_bytes():
    """Bytes in use on the first GPU, by nvidia-smi; 0 where it does not tell."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    asked = ["nvidia-smi", "-i", first, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if not shutil.which(asked[0]):
        return 0
    said = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return 2**20 * int(said) if said.isdecimal() else 0


def row(step):
    """A step's row of the table."""
    gpu = "-" if not step["gpu_bytes"] else f"{step['gpu_bytes'] / 2**30:.2f} GiB"
    return f"{step['step']:<9} {step['seconds']:>8.1f} {step['peak_bytes'] / 2**30:>9.2f} GiB {gpu:>12}"


def run(argv):
    """Command line -> main; a UserError is one line and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.bench.rehearsal", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for rehearsal.json, the run, and meanwhile the weights")
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "no"), help="fp16 on a GPU; else bf16 if the CPU has it"
    )
    parser.add_argument(
        "--architecture", help="OpenCLIP's name of the reward; the paper's ViT-H-14 on a GPU, else ViT-B-32"
    )
    given = parser.parse_args(argv[1:])
    architecture = given.architecture or ("ViT-H-14" if torch.cuda.is_available() else "ViT-B-32")
    try:
        main(given.out, given.precision or default_precision(), architecture)
    except UserError as error:
        sys.exit(f"rehearsal.py: {error}")


if __name__ == "__main__":
    run(sys.argv)
