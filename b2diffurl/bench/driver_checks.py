"""What a first run meets in the driver: several processes against one, the shapes preset's default run, D-Fusion."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from ..evaluate import before_after
from ..run import metrics, storage

TINY = (  # settings of a run that does everything once
    "sample.groups=8", "sample.branches=2", "sample.num_steps=5", "schedule.stage_count=1", "schedule.left=3",
    "schedule.right=3", "select.pos_threshold=-9", "select.neg_threshold=9", "train.trajectories_per_update=16",
    "train.num_epochs=1", "evaluate.images_per_prompt=1",
)  # fmt: skip
CPU_FIGURES = "to compare: the table of docs/results.md, on two CPU cores"


def several_processes(scratch):
    """A tiny run on one GPU and on all, or by one process and by two without GPUs: pictures, gradient norm."""
    gpus, cpu = torch.cuda.device_count(), {"CUDA_VISIBLE_DEVICES": ""}
    one = {"CUDA_VISIBLE_DEVICES": first_gpu()} if gpus > 1 else cpu
    many = {} if gpus > 1 else {**cpu, "LAUNCH": "torchrun --standalone --nproc_per_node 2"}
    ours, norm = outcome(drive(scratch, "gpu_check_one", TINY, **one))
    theirs, other = outcome(drive(scratch, "gpu_check_many", TINY, **many))
    off = np.abs(ours - theirs)
    line = f"{gpus} GPUs against one" if gpus > 1 else "two processes on the CPU against one"
    line += f": pixels differ by at most {off.max()} of 255, {(off > 0).mean():.2%} of them; gradient norms "
    line += f"{norm:.6g} and {other:.6g}"
    if (off > 1).mean() > 1e-3 or abs(other / norm - 1) > 0.01:
        raise ValueError(f"more than rounding: {line}")
    return [line], {"largest_pixel_difference": int(off.max()), "grad_norms": [norm, other]}


def outcome(run):
    """The pictures of a run's stage 0, (N, H, W, 3), and the norm of its gradient."""
    pictures = [np.asarray(Image.open(path)) for path in sorted((run / "stage0/images").iterdir())]
    trained = next(line for line in metrics.read(run / "metrics.jsonl") if line["step"] == "train")
    return np.stack(pictures).astype(int), trained["train/grad_norm"]


def shapes_run(scratch):
    """The default run of the shapes preset on one GPU; without one, the tiny run of several_processes."""
    if torch.cuda.is_available():
        run, note = drive(scratch, "gpu_check_shapes", (), CUDA_VISIBLE_DEVICES=first_gpu()), CPU_FIGURES
    else:
        run, note = drive(scratch, "gpu_check_one", TINY, CUDA_VISIBLE_DEVICES=""), "a tiny run, which learns nothing"
    results = storage.read_json(run / "eval.json", "the evaluation")["results"]
    return [*before_after.table(results).splitlines(), note], {"results": results}


def fused_run(scratch):
    """A tiny run of D-Fusion, in half precision on a GPU."""
    settings = {
        "method": "dfusion", "sample.branches": 4, "schedule.left": 5, "schedule.right": 5, "schedule.untrained": 1,
        "train.log_prob": "mean", "train.algorithm": "dpo",
    }  # fmt: skip
    if torch.cuda.is_available():
        settings |= {"mixed_precision": "fp16"}
    more = [f"{name}={value}" for name, value in settings.items()]
    run = drive(scratch, "gpu_check_fused", [*TINY, *more], CUDA_VISIBLE_DEVICES=first_gpu())
    found = {line["step"]: line for line in metrics.read(run / "metrics.jsonl")}
    fused, error = found["fuse"], found["train"]["policy/ratio_first_error"]
    if not fused["fuse/targets"] or not found["train"]["train/updates"]:
        raise ValueError("no targets were made, or nothing was trained on them")
    means = {own: fused[f"fuse/{own}"] for own in ("base_reward", "target_reward", "mask_share", "distance", "kl")}
    line = f"{fused['fuse/targets']} targets: " + ", ".join(f"{own} {value:.3f}" for own, value in means.items())
    return [f"{line}; a first ratio is off 1 by at most {error:.1e}"], {**means, "ratio_first_error": error}


def first_gpu():
    """The first of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def drive(scratch, name, settings, **environment):
    """PRESET=shapes bash run_process.sh -> its run's folder; a run that is there is not made again.

    Raises RuntimeError with its last lines where it fails; an exception here, as of a time that is up, ends it too.
    """
    run = scratch / name
    if (run / "eval.json").exists():
        return run
    flags = [f"--config.{setting}" for setting in (f"save_path={scratch}", f"exp_name={name}", *settings)]
    given = {"PRESET": "shapes", "PYTHON": sys.executable, "LAUNCH": "", **environment}
    with (scratch / f"{name}.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            ["bash", "run_process.sh", *flags], stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **given}, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            pathlib.Path("log", f"{name}.log").unlink(missing_ok=True)
        if process.returncode:
            output.seek(0)
            raise RuntimeError("\n".join(["run_process.sh failed:", *output.read().splitlines()[-4:]]))
    return run
