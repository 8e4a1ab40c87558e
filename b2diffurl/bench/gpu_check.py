"""What a first run on a GPU meets, tried in at most 25 minutes: `python -m b2diffurl.bench --gpu-check --out DIR`.

SD v1.4's geometry with random weights in fp16 and bf16, several processes against one, and the default `shapes` run.
Every check is in DIR/gpu_check.txt and DIR/gpu_check.json as soon as it has ended. Without a GPU the same code runs at
the size of the shapes world.
"""

import contextlib
import datetime
import functools
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np
import torch
from PIL import Image

from .. import models
from ..evaluate import before_after
from ..run import metrics, storage
from ..run.command import parse
from ..run.folder import versions
from ..stages.train import build_optimizer
from ..update import accumulate, loss_scale, train_updates
from . import meter, random_weights, rates

LIMIT, LATEST = 25 * 60, 22 * 60  # seconds from the start until everything has ended, and until the last check begins
GOAL = 6e9  # bytes of a GPU in which training, one pair a call, should fit
TINY = (  # settings of a run that does everything once
    "sample.groups=8", "sample.branches=2", "sample.num_steps=5", "schedule.stage_count=1", "schedule.left=3",
    "schedule.right=3", "select.pos_threshold=-9", "select.neg_threshold=9", "train.trajectories_per_update=16",
    "train.num_epochs=1", "evaluate.images_per_prompt=1",
)  # fmt: skip
CHECKS = {  # of a Precision, in this order: how many seconds each may take
    "memory": 90, "largest_batches": 120, "throughput": 180, "first_pass": 120, "updates": 120,
}  # fmt: skip
CPU_FIGURES = "to compare: the README's table under Measured, on two CPU cores"


def main(folder):
    """Make all checks, with their files in a folder -> exit code: 1 if one failed."""
    cuda, report = torch.cuda.is_available(), Report(folder)
    report.say(meter.machine() if cuda else "no CUDA device here: the same code at small size, on the CPU")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        scratch = pathlib.Path(scratch)
        precisions = ("fp16", "bf16") if cuda else ("bf16", "no")
        if cuda and not report.check("random weights", 180, lambda: random_weights.write(scratch, "fp16", "ViT-H-14")):
            precisions = ()
        for precision in precisions:
            own = Precision(configure(precision, scratch), scratch / precision)
            for name, seconds in CHECKS.items():
                title = f"{'float32' if precision == 'no' else precision}: {name.replace('_', ' ')}"
                report.check(title, seconds, getattr(own, name))
            del own  # and with it the models
        report.check("several processes", 180, lambda: several_processes(scratch))
        report.check("shapes run", 300, lambda: shapes_run(scratch))
    return report.end()


class Report:
    """The checks' outcomes: printed, and written to gpu_check.txt and gpu_check.json, one by one."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.began, self.checks = folder, time.monotonic(), []
        self.facts = {"date": str(datetime.date.today()), "machine": meter.machine(), "versions": versions()}
        (folder / "gpu_check.txt").write_text("", encoding="utf-8")

    def say(self, text):
        """Print the text, and add it to gpu_check.txt."""
        print(text, flush=True)
        with (self.folder / "gpu_check.txt").open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")

    def check(self, name, budget, work):
        """Run work() -> (lines, figures) or None, for `budget` seconds at most -> whether it went well."""
        began = time.monotonic()
        row = {"check": name, "outcome": "skipped", "budget_s": budget}
        if began - self.began > LATEST:
            lines = [f"{LATEST // 60} minutes have passed"]
        else:
            try:
                meter.release()  # what the check before it has left
                with meter.within(min(budget, self.began + LIMIT - began)):
                    lines, row["figures"] = work() or ([], {})
                row["outcome"] = "passed"
            except Exception as error:  # whatever it is, the other checks go on
                row |= {"outcome": "FAILED", "traceback": traceback.format_exc()}
                lines = f"{type(error).__name__}: {error}".strip().splitlines()[:5]
        row |= {"seconds": round(time.monotonic() - began, 1), "lines": lines}
        self.checks.append(row)
        self.say("\n    ".join([f"{row['outcome']:<8}{name}, {row['seconds']} s (at most {budget})", *lines]))
        storage.write_json(self.folder / "gpu_check.json", {**self.facts, "checks": self.checks})
        return row["outcome"] == "passed"

    def end(self):
        """Say how it went -> exit code."""
        count = {outcome: sum(row["outcome"] == outcome for row in self.checks) for outcome in ("passed", "FAILED")}
        skipped, minutes = len(self.checks) - sum(count.values()), (time.monotonic() - self.began) / 60
        self.say(f"{count['passed']} passed, {count['FAILED']} failed, {skipped} skipped; {minutes:.1f} minutes")
        return 1 if count["FAILED"] else 0


def configure(precision, scratch):
    """The configuration of a Precision: sdv1.4 on the random weights; without a GPU, shapes with small batches."""
    settings = [f"mixed_precision={precision}", "train.log_prob=mean"]
    if torch.cuda.is_available():
        preset, clip = "sdv1.4", scratch / "clip"
        settings += [f"pretrained.model={scratch / 'pipeline'}", f"reward.model=local-dir:{clip}", "reward.weights="]
    else:
        preset = "shapes"
        settings += ["sample.batch_size=5", "train.batch_size=8", "reward.batch_size=4", "sample.num_steps=8"]
        settings += ["schedule.left=6", "schedule.right=8"]
    return parse(["", "--config", f"config/stage_process.py:{preset}", *(f"--config.{given}" for given in settings)])[0]


class Precision:
    """The checks of one precision; they share the models, and a LoRA that does something."""

    def __init__(self, config, checkpoint):
        self.config, self.checkpoint, self.cuda = config, checkpoint, torch.cuda.is_available()

    @functools.cached_property
    def loaded(self):
        """The Models; the LoRA is written when they are."""
        loaded = models.Models(self.config)
        random_weights.write_lora(loaded, self.checkpoint)
        return loaded

    def memory(self):
        """Memory of an update, one pair a call, without and with gradient checkpointing."""
        lines, figures = [], {}
        scheduler, pair = meter.sample_pairs(self.loaded, self.checkpoint, 1, 1)
        models.decode(self.loaded.vae, pair.latents[:, -1])  # so that all that a run keeps on the device is there
        unet, parameters = self.loaded.trainable(self.checkpoint)
        switches = {"without": unet.disable_gradient_checkpointing, "with": unet.enable_gradient_checkpointing}
        for name, switch in switches.items():
            switch()
            optimizer, figures[name] = build_optimizer(self.config, parameters), {}
            with meter.peak_memory(figures[name]):
                scale = loss_scale(unet, pair, 1, self.config)
                accumulate(unet, scheduler, pair, torch.arange(1), self.config, torch.Generator(), scale)
                optimizer.step()
                optimizer.zero_grad()
            lines.append(f"{name} gradient checkpointing: peak {gib(figures[name]['peak_bytes'])}")
            if self.cuda:
                free, total = torch.cuda.mem_get_info()
                used = figures[name]["device_bytes"] = total - free
                met = "" if used < GOAL else "not "
                lines[-1] += f" allocated, {gib(used)} of the device used: {met}under {GOAL / 1e9:g} GB"
        unet.disable_gradient_checkpointing()
        return lines, figures

    def largest_batches(self):
        """How many images a sampling call and how many pairs a training call can have, found by doubling."""
        most, found = (256 if self.cuda else 8), {}
        scheduler, pair = meter.sample_pairs(self.loaded, self.checkpoint, 1, 1)
        sampler, config = self.loaded.sampler(self.checkpoint), self.config.copy_and_resolve_references()

        def sample(n):
            latents, noise = pair.latents[[0] * n, 0], torch.randn(n, 1, *sampler.latent_shape)
            path, _ = sampler.denoise(latents, pair.embeds[[0] * n], noise, [0])
            models.decode(self.loaded.vae, path[:, 0])

        found["sampling"], why_sampling = meter.largest(most, sample)
        unet, _ = self.loaded.trainable(self.checkpoint)
        config.train.batch_size = most
        found["training"], why_training = meter.largest(most, lambda n: rates.update(unet, scheduler, pair, n, config))
        self.config.sample.batch_size = min(found["sampling"], self.config.sample.batch_size)
        self.config.train.batch_size = min(found["training"], self.config.train.batch_size)
        return [
            f"sampling: {found['sampling']} images ({why_sampling or 'more were not tried'})",
            f"training: {found['training']} pairs ({why_training or 'more were not tried'})",
        ], found

    def throughput(self):
        """Rates of sampling, training and scoring, and their share of the matmul rate."""
        budget = 10.0 if self.cuda else 0.1
        sampling, _, pictures = rates.measure_sampling(self.loaded, self.checkpoint, budget)
        phases = {"sampling": sampling, "training": rates.measure_training(self.loaded, self.checkpoint, budget)}
        phases["scoring"] = rates.measure_scoring(self.loaded, pictures, budget)
        if not self.cuda:
            return ["sampling, training and scoring ran; how fast says nothing about a GPU"], {}
        shares = rates.add_shares(self.config, phases, budget / 3)
        lines = [rates.HEAD, *(rates.phase_line(name, phase) for name, phase in phases.items())]
        return [f"matmul {shares['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s", *lines], {**shares, "phases": phases}

    def first_pass(self):
        """How far training's densities are off sampling's before any update, by step."""
        config = self.config
        images, steps, batch = config.sample.batch_size, config.sample.num_steps, config.train.batch_size
        figures = meter.first_pass(self.loaded, self.checkpoint, images, steps, batch)
        lines = meter.first_pass_lines(figures)
        if not max(row["prediction_error"] for row in figures["by_step"]) <= figures["allowed"]:
            raise ValueError("\n".join(["rounding does not explain that", *lines]))
        return lines, figures

    def updates(self):
        """50 updates by the run's own loop, of 2 trajectories and 4 steps, the first one's densities checked."""
        count, norms = (50 if self.cuda else 5), []
        config = self.config.copy_and_resolve_references()
        config.train.trajectories_per_update, config.train.num_epochs, config.train.accumulate_over = 2, count, "stage"
        scheduler, pairs = meter.sample_pairs(self.loaded, self.checkpoint, 2, 4)
        unet, parameters = self.loaded.trainable(self.checkpoint)
        seen, headroom = train_updates(
            unet, scheduler, build_optimizer(config, parameters), [*parameters.values()], pairs, config,
            torch.Generator().manual_seed(0), lambda _, norm: norms.append(norm),
        )  # fmt: skip
        if len(norms) != count or not all(parameter.isfinite().all() for parameter in parameters.values()):
            raise ValueError(f"{len(norms)} updates of {count}, or a LoRA that is not finite")
        figures = {"updates": count, "pairs": seen, "headroom": headroom, "grad_norms": norms}
        norms = f"gradient norms {min(norms):.3g} to {max(norms):.3g}"
        return [f"{count} updates of {seen} pairs in all, all finite; {norms}; loss scale times {headroom:g}"], figures


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


def gib(count):
    """Bytes as text."""
    return "an unknown amount" if count is None else f"{count / 2**30:.2f} GiB"
