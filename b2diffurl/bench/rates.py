"""How fast a preset is on this machine, and how exact: rates, memory, start-up, and the first pass's error by step.

`python -m b2diffurl.bench [--preset NAME] [--device cpu|cuda] [--out DIR] [--quick] [--config.x.y=value ...]`
A preset whose models are on the hub is measured with random weights of their geometry; nothing is downloaded.
`python -m b2diffurl.bench --gpu-check --out DIR` tries what a first run on a GPU meets: see gpu_check.py.
"""

import dataclasses
import datetime
import io
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import torch
from PIL import Image

from .. import models
from ..errors import UserError
from ..rewards import full_float32
from ..run import metrics
from ..run.config import METHODS, interval_of, read_prompts
from ..run.folder import versions
from ..update import accumulate, loss_scale, precision_of
from . import meter, random_weights
from .meter import count, count_each, fitting, seconds_a_call

MINIMAL = (  # a stage that does everything once: for the start-up times
    "--config.exp_name=bench_startup", "--config.stage=0", "--config.method=b2", "--config.sample.groups=1",
    "--config.sample.branches=1", "--config.sample.num_steps=1", "--config.schedule.left=1",
    "--config.schedule.right=1", "--config.select.pos_threshold=-9", "--config.log_with=",
)  # fmt: skip
SECONDS = 15.0  # for each figure
HEAD = "phase      batch   rate               TFLOP/s   of matmul   in the UNet   peak memory"


def main(config, flags, out, quick):
    """Measure; print the table; write bench.json and bench.txt into `out` unless it is "".

    flags: the command line that config came from, for the scripts whose start is timed. quick: a fifth of the time, and
    without scoring and start-up where the weights are random.
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        config.mixed_precision = "bf16"  # CPUs have instructions for that, if for either
        flags = [*flags, "--config.mixed_precision=bf16"]
    budget, weights = SECONDS / 5 if quick else SECONDS, config.pretrained.model
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        ready, found = random_weights.provide(config, scratch, quick)
        loaded, checkpoint, starts = models.Models(config), scratch / "lora", {}
        parameters = random_weights.write_lora(loaded, checkpoint)
        sampling, latent, pictures = measure_sampling(loaded, checkpoint, budget)
        training = measure_training(loaded, checkpoint, budget)
        first = meter.first_pass(loaded, checkpoint, *meter.affordable(config, sampling, training["batch"], 4 * budget))
        phases = {"sampling": sampling, "training": training}
        if ready or not quick:
            phases["scoring"] = measure_scoring(loaded, pictures, budget)
            starts = startup_seconds(
                [*flags, *found, f"--config.save_path={scratch}", *MINIMAL], scratch / "bench_startup"
            )
    result = {
        "date": str(datetime.date.today()), "machine": meter.machine(), "threads": torch.get_num_threads(),
        "versions": versions(),
        "weights": weights if pathlib.Path(weights).is_dir() else f"random, geometry of {weights}",
        "precision": config.mixed_precision, **add_shares(config, phases, budget / 3), "unet_parameters": parameters,
        **sizes(config, latent, pictures[0]), "phases": phases, "first_pass": first, "startup_s": starts,
    }  # fmt: skip
    print(table(result))
    if out:
        folder = pathlib.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder / "bench.txt").write_text(table(result) + "\n", encoding="utf-8")


def mean_interval(config):
    """Start and length of the trained interval, in steps, averaged over the run's stages."""
    stages, copy = [], config.copy_and_resolve_references()
    for copy.stage in range(config.schedule.stage_count):
        stages.append(interval_of(copy))
    return statistics.mean(first for first, _ in stages), statistics.mean(stop - first for first, stop in stages)


def prefix_share(config):
    """How much of a prefix an image pays for: its group's branches share one."""
    return 1 / config.sample.branches if METHODS[config.method][1] else 1


def steps_per_image(config):
    """Guided UNet steps that an image pays for."""
    start, length = mean_interval(config)
    return start * prefix_share(config) + length


def sizes(config, latent, picture):
    """Facts of an image: latent (C, H, W), its PIL picture, and what a stage stores of it."""
    coded, length = io.BytesIO(), mean_interval(config)[1]
    picture.save(coded, "png")
    latents = (length + prefix_share(config)) * latent.nbytes
    return {
        "latent_shape": list(latent.shape),
        "picture_size": list(picture.size),
        "unet_steps_per_image": steps_per_image(config),
        "stored_bytes_per_image": round(latents + 4 * length) + len(coded.getvalue()),
    }


def measure_sampling(loaded, checkpoint, budget):
    """An image is steps_per_image guided steps, and decoding -> (figures, a latent (C, H, W), pictures)."""
    config, phase, steps = loaded.config, {"unit": "images"}, steps_per_image(loaded.config)
    with meter.peak_memory(phase):
        sampler, vae = loaded.sampler(checkpoint), loaded.vae
        before = sampler.initial(torch.randn(max(2, config.sample.batch_size), *sampler.latent_shape))
        noise = torch.randn(len(before), 1, *sampler.latent_shape)
        own = loaded.embed([read_prompts(config.prompts.train)[0]]).to(before.device)

        def walk(n):
            return sampler.denoise(before[:n], own.expand(n, -1, -1), noise[:n], [0])[0][:, 0]

        @torch.no_grad()
        def unet_alone(n):
            latents = before[:n].repeat(2, 1, 1, 1).to(sampler.unet.dtype)
            sampler.unet(latents, sampler.scheduler.timesteps[0], own.expand(2 * n, -1, -1))

        batch = fitting(config.sample.batch_size, walk, budget)
        guided = seconds_a_call(lambda: walk(batch), budget)
        alone = seconds_a_call(lambda: unet_alone(batch), budget / 3)
        latents = walk(batch)
        finish = seconds_a_call(lambda: models.decode(vae, latents), budget / 3)
        pictures = [Image.fromarray(picture.numpy()) for picture in models.decode(vae, latents[:4]).cpu()]
    seconds = (steps * guided + finish) / batch
    step_flops, _ = count_each(walk, sampler.unet)
    flops = steps * step_flops + count(lambda: models.decode(vae, latents[:1]), vae)[0]
    phase |= {"batch": batch, "per_s": 1 / seconds, "seconds_per_step": guided / batch, "flops_per_step": step_flops}
    phase |= {"flops_each": flops, "flops_per_s": flops / seconds}
    return phase | {"unet_share": min(1.0, steps * alone / batch / seconds)}, latents[0], pictures


def measure_training(loaded, checkpoint, budget):
    """Forward and backward of (sample, step) pairs, as an update of ddpo_is accumulates them -> figures."""
    config, phase = loaded.config, {"unit": "pairs"}
    config.train.algorithm = "ddpo_is"
    scheduler, pair = meter.sample_pairs(loaded, checkpoint, 1, 1)
    with meter.peak_memory(phase):
        unet, _ = loaded.trainable(checkpoint)
        batch = fitting(config.train.batch_size, lambda n: update(unet, scheduler, pair, n, config), budget)
        seconds = seconds_a_call(lambda: update(unet, scheduler, pair, batch, config), budget) / batch
    flops, kept = count_each(lambda n: update(unet, scheduler, pair, n, config), unet)
    phase |= {"batch": batch, "per_s": 1 / seconds, "flops_each": flops, "flops_per_s": flops / seconds}
    return phase | {"kept_bytes_per_pair": kept}


def update(unet, scheduler, pair, count, config):
    """Compute the gradients of an update of `pair`, Pairs (1, 1), `count` times, and drop them."""
    rows = [0] * count
    pairs = dataclasses.replace(
        pair, latents=pair.latents[rows], log_probs=pair.log_probs[rows], advantages=pair.advantages[rows],
        embeds=pair.embeds[rows],
    )  # fmt: skip
    scale, generator = loss_scale(unet, pairs, count, config), torch.Generator().manual_seed(0)
    try:
        accumulate(unet, scheduler, pairs, torch.arange(count), config, generator, scale)
    finally:
        unet.zero_grad()


def measure_scoring(loaded, pictures, budget):
    """The reward on the sampled pictures -> figures."""
    config, phase = loaded.config, {"unit": "images"}
    prompts = read_prompts(config.prompts.train)[:8]
    with meter.peak_memory(phase), loaded.scoring() as reward:

        def work(n):
            reward([pictures[i % len(pictures)] for i in range(n)], [prompts[i % len(prompts)] for i in range(n)])

        batch = fitting(config.reward.batch_size, work, budget)
        seconds = seconds_a_call(lambda: work(batch), budget / 3) / batch
        flops = count(lambda: work(batch), torch.nn.Module())[0] / batch
    return phase | {"batch": batch, "per_s": 1 / seconds, "flops_each": flops, "flops_per_s": flops / seconds}


def add_shares(config, phases, budget):
    """Put every phase's share of the matmul rate in its precision into it -> {the rates}; a reward is float32.

    Raises UserError for more than the whole: either the operations or the yardstick would be wrong.
    """
    own = meter.matmul_rate(models.DTYPES[config.mixed_precision], budget)
    with full_float32():
        scoring = own if precision_of(config) == "no" else meter.matmul_rate(torch.float32, budget)
    for name, phase in phases.items():
        share = phase["matmul_share"] = phase["flops_per_s"] / (scoring if name == "scoring" else own)
        if share > 1:
            raise UserError(
                f"{name} came out at {share:.0%} of the rate of a matrix product: the count of operations is wrong, or "
                "that rate was taken while something else ran; run it again by itself, and report it if it stays"
            )
    return {"matmul_flops_per_s": own, "float32_matmul_flops_per_s": scoring}


def startup_seconds(flags, run_folder):
    """Seconds from the start of each script's process to its first useful work, in a stage of one image."""
    for step in ("sample", "select", "train"):
        done = subprocess.run([sys.executable, f"run_{step}.py", *flags], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"run_{step}.py failed: {done.stderr.strip().splitlines()[-1]}")
    pathlib.Path("log/bench_startup.log").unlink()
    return {line["step"]: line["perf/startup_s"] for line in metrics.read(run_folder / "metrics.jsonl")}


def table(result):
    """The figures as text."""
    channels, height, width = result["latent_shape"]
    model = f"UNet of {result['unet_parameters'] / 1e6:.2f} M parameters, latents {channels}x{height}x{width}"
    matmul = f"matmul {result['matmul_flops_per_s'] / 1e12:.3f} TFLOP/s"
    if result["float32_matmul_flops_per_s"] != result["matmul_flops_per_s"]:
        matmul += f" (float32, for scoring: {result['float32_matmul_flops_per_s'] / 1e12:.3f})"
    starts = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in result["startup_s"].items())
    return "\n".join([
        f"{result['machine']}; {result['date']}",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"weights: {result['weights']}; {model}, pictures {'x'.join(map(str, result['picture_size']))}",
        f"precision {result['precision']}, {result['threads']} threads; {matmul}; "
        f"{result['unet_steps_per_image']:.2f} guided steps an image",
        "",
        HEAD,
        *(phase_line(name, phase) for name, phase in result["phases"].items()),
        "",
        f"start-up: {starts or 'not measured'}",
        f"stored: {result['stored_bytes_per_image'] / 1024:.1f} KiB an image; kept for the backward pass: "
        f"{result['phases']['training']['kept_bytes_per_pair'] / 2**20:.2f} MiB a pair",
        *meter.first_pass_lines(result["first_pass"]),
    ])  # fmt: skip


def phase_line(name, phase):
    """A phase's row of the table."""
    rate = f"{phase['per_s']:.4g} {phase['unit']}/s"
    unet = f"{phase['unet_share']:.0%}" if "unet_share" in phase else "-"
    memory = f"{phase['peak_bytes'] / 2**20:.0f} MiB" if phase["peak_bytes"] else "-"
    return (
        f"{name:<9} {phase['batch']:>6}   {rate:<17} {phase['flops_per_s'] / 1e12:>8.3f} "
        f"{phase['matmul_share']:>11.0%} {unet:>13} {memory:>13}"
    )
