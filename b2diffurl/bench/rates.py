"""How fast a preset is on this machine, and how exact: rates, memory, start-up, and the first pass's error by step.

`python -m b2diffurl.bench [--preset NAME] [--device cpu|cuda] [--out DIR] [--quick] [--config.x.y=value ...]`
A preset whose models are on the hub is measured with random weights of their geometry; nothing is downloaded.
`python -m b2diffurl.bench --gpu-check --out DIR` tries what a first run on a GPU meets: see gpu_check.py.
"""

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

from ..errors import UserError
from ..families.loading import DTYPES
from ..guidance import take, to_device
from ..models import Models
from ..plan import stage_plan
from ..rewards.loading import full_float32
from ..rollout import denoise
from ..run import metrics
from ..run.folder import versions
from ..run.prompts import read_prompts
from ..update import Learner, accumulate, build_optimizer, loss_scale
from . import densities, meter, random_weights
from .meter import count, count_each, fitting, seconds_per_call

MINIMAL = (  # a stage that does everything once: for the start-up times
    "--config.exp_name=bench_startup", "--config.stage=0", "--config.method=b2", "--config.sample.groups=1",
    "--config.sample.branches=2", "--config.sample.num_steps=2", "--config.schedule.left=2",
    "--config.schedule.right=2", "--config.schedule.untrained=1", "--config.select.pos_threshold=-9",
    "--config.select.neg_threshold=9", "--config.select.credit=", "--config.log_with=",
)  # fmt: skip
SECONDS = 15.0  # for each figure
HEAD = "phase      batch   rate                  TFLOP/s   of matmul   in the UNet   peak memory"


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
        loaded, checkpoint, starts = Models(config), scratch / "lora", {}
        parameters = random_weights.write_lora(loaded, checkpoint)
        sampling, latent, pictures = measure_sampling(loaded, checkpoint, budget)
        training = measure_training(loaded, checkpoint, budget)
        sizes_of_pass = densities.affordable(config, sampling, training["batch"], 4 * budget)
        first = densities.first_pass(loaded, checkpoint, *sizes_of_pass)
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


def stage_plans(config):
    """The Plan of every stage of the run."""
    copy = config.copy_and_resolve_references()
    return [stage_plan(copy) for copy.stage in range(config.schedule.stage_count)]


def steps_per_image(config):
    """Guided predictions that an image pays for, averaged over the run's stages."""
    return statistics.mean(plan.evaluations / plan.images for plan in stage_plans(config))


def sizes(config, latent, picture):
    """Facts of an image: latent (C, H, W), its PIL picture, and what a stage stores of it."""
    coded, of_transition = io.BytesIO(), 4 + 4 * 8  # bytes of a log-probability and of four indices
    picture.save(coded, "png")
    stored = [
        (plan.states * latent.nbytes + len(plan.transitions.step) * of_transition) / plan.images
        for plan in stage_plans(config)
    ]
    return {
        "latent_shape": list(latent.shape),
        "picture_size": list(picture.size),
        "unet_steps_per_image": steps_per_image(config),
        "stored_bytes_per_image": round(statistics.mean(stored)) + len(coded.getvalue()),
        "picture_bytes": len(coded.getvalue()),
    }


def measure_sampling(loaded, checkpoint, budget):
    """An image is steps_per_image guided steps, and decoding -> (figures, a latent (C, H, W), pictures)."""
    config, phase, steps, family = loaded.config, {"unit": "images"}, steps_per_image(loaded.config), loaded.family
    with meter.peak_memory(phase):
        policy = loaded.policy(checkpoint)
        denoiser, noise = policy.denoiser, torch.randn(max(2, config.sample.batch_size), 1, *family.latent_shape)
        before, noise = policy.initial(noise[:, 0]), noise.to(policy.device)
        own = to_device(family.embed([read_prompts(config.prompts.train)[0]]), policy.device)

        def walk(n):
            return denoise(policy, before[:n], take(own, [0] * n), noise[:n], [0])[0][1]

        @torch.no_grad()
        def denoiser_alone(n):
            latents = before[:n].repeat(family.evaluations, *[1] * (before.ndim - 1))
            time = policy.kernel.time(torch.zeros(len(latents), dtype=torch.long))
            family.call(denoiser, latents, time, take(own, [0] * len(latents)))

        batch = fitting(config.sample.batch_size, walk, budget)
        guided = seconds_per_call(lambda: walk(batch), budget)
        alone = seconds_per_call(lambda: denoiser_alone(batch), budget / 3)
        latents = walk(batch)
        finish = seconds_per_call(lambda: family.decode(latents), budget / 3)
        pictures = [Image.fromarray(picture.numpy()) for picture in family.decode(latents[:4]).cpu()]
    seconds = (steps * guided + finish) / batch
    step_flops, _ = count_each(walk, denoiser)
    flops = steps * step_flops + count(lambda: family.decode(latents[:1]), family.vae)[0]
    phase |= {"batch": batch, "per_s": 1 / seconds, "seconds_per_step": guided / batch, "flops_per_step": step_flops}
    phase |= {"flops_each": flops, "flops_per_s": flops / seconds}
    return phase | {"unet_share": min(1.0, steps * alone / batch / seconds)}, latents[0], pictures


def measure_training(loaded, checkpoint, budget):
    """Forward and backward of transitions, as an update of ddpo_is accumulates them -> figures."""
    config, phase = loaded.config, {"unit": "transitions"}
    config.train.algorithm = "ddpo_is"
    _, experience = densities.sampled(loaded, checkpoint, 1, 1)
    with meter.peak_memory(phase):
        policy, parameters = loaded.trainable(checkpoint)
        learner = Learner(policy, build_optimizer(config.train, parameters))

        def work(n):
            gradients(learner, experience, n, config.train)

        batch = fitting(config.train.batch_size, work, budget)
        seconds = seconds_per_call(lambda: work(batch), budget) / batch
    flops, saved = count_each(work, policy.denoiser)
    phase |= {"batch": batch, "per_s": 1 / seconds, "flops_each": flops, "flops_per_s": flops / seconds}
    return phase | {"saved_bytes_per_transition": saved}


def gradients(learner, experience, count, train):
    """Compute the gradients of an update of an experience's one transition, `count` times, and drop them."""
    many, generator = densities.repeated(experience, count), torch.Generator().manual_seed(0)
    try:
        accumulate(learner, many, torch.arange(count), train, generator, loss_scale(learner.policy, many, count, train))
    finally:
        learner.optimizer.zero_grad()


def measure_scoring(loaded, pictures, budget):
    """The reward on the sampled pictures -> figures."""
    config, phase = loaded.config, {"unit": "images"}
    prompts = read_prompts(config.prompts.train)[:8]
    with meter.peak_memory(phase), loaded.scoring() as reward:

        def work(n):
            reward([pictures[i % len(pictures)] for i in range(n)], [prompts[i % len(prompts)] for i in range(n)])

        batch = fitting(config.reward.batch_size, work, budget)
        seconds = seconds_per_call(lambda: work(batch), budget / 3) / batch
        flops = count(lambda: work(batch), torch.nn.Module())[0] / batch
    return phase | {"batch": batch, "per_s": 1 / seconds, "flops_each": flops, "flops_per_s": flops / seconds}


def add_shares(config, phases, budget):
    """Put every phase's share of the matmul rate in its precision into it -> {the rates}; a reward is float32.

    Raises UserError for more than the whole: either the operations or the yardstick would be wrong.
    """
    own = meter.matmul_rate(DTYPES[config.mixed_precision], budget)
    tf32 = config.allow_tf32 and torch.cuda.is_available()
    with full_float32():
        same = config.mixed_precision == "no" and not tf32
        scoring = own if same else meter.matmul_rate(torch.float32, budget)
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
        f"{result['unet_steps_per_image']:.2f} guided steps per image",
        "",
        HEAD,
        *(phase_line(name, phase) for name, phase in result["phases"].items()),
        "",
        f"start-up: {starts or 'not measured'}",
        f"stored: {result['stored_bytes_per_image'] / 1024:.1f} KiB per image; saved for the backward pass: "
        f"{result['phases']['training']['saved_bytes_per_transition'] / 2**20:.2f} MiB per transition",
        *densities.first_pass_lines(result["first_pass"]),
    ])  # fmt: skip


def phase_line(name, phase):
    """A phase's row of the table."""
    rate = f"{phase['per_s']:.4g} {phase['unit']}/s"
    unet = f"{phase['unet_share']:.0%}" if "unet_share" in phase else "-"
    memory = f"{phase['peak_bytes'] / 2**20:.0f} MiB" if phase["peak_bytes"] else "-"
    return (
        f"{name:<9} {phase['batch']:>6}   {rate:<20} {phase['flops_per_s'] / 1e12:>8.3f} "
        f"{phase['matmul_share']:>11.0%} {unet:>13} {memory:>13}"
    )
