"""How fast a preset is on this machine: images/s, pairs/s, memory, start-up, and the share of the matmul rate.

`python -m b2diffurl.bench [--preset NAME] [--device cpu|cuda] [--out DIR] [--quick] [--config.x.y=value ...]`
A preset whose models are on the hub is measured with random weights of their geometry; nothing is downloaded.
"""

import argparse
import datetime
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import torch
from PIL import Image

from . import files, metrics, models, random_weights
from .configuration import METHODS, UserError, interval_of, read_prompts, run_main
from .meter import count, fitting, machine, matmul_rate, peak_memory, seconds_a_call
from .rewards import load_reward
from .training import Pairs, accumulate, loss_scale

GEOMETRY_OF = "CompVis/stable-diffusion-v1-4"  # what random_weights.py makes
MINIMAL = (  # a stage that does everything once: for the start-up times
    "--config.exp_name=bench_startup", "--config.stage=0", "--config.method=b2", "--config.sample.groups=1",
    "--config.sample.branches=1", "--config.sample.num_steps=1", "--config.schedule.left=1",
    "--config.schedule.right=1", "--config.select.pos_threshold=-9", "--config.log_with=",
)  # fmt: skip


def main(config, flags, out, quick):
    """Measure; print the table; write bench.json and bench.txt into `out` unless it is "".

    flags: the command line that config came from, for the scripts whose start is timed. quick: a fifth of the time, and
    without scoring and start-up where the weights are random.
    """
    models.prepare(config)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        config.mixed_precision = "bf16"  # CPUs have instructions for that, if for either
        flags = [*flags, "--config.mixed_precision=bf16"]
    budget, weights = 3.0 if quick else 15.0, config.pretrained.model
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        ready, found = provide_weights(config, scratch, quick)
        peak = matmul_rate(models.DTYPES[config.mixed_precision], budget / 3)
        model, phases, pictures = measure_policy(config, scratch, budget)
        starts = {}
        if ready or not quick:
            phases["scoring"] = measure_scoring(config, pictures, budget)
            starts = startup_seconds(
                [*flags, *found, f"--config.save_path={scratch}", *MINIMAL], scratch / "bench_startup"
            )
    for phase in phases.values():
        phase["matmul_share"] = phase["flops_per_s"] / peak
    result = {
        "date": str(datetime.date.today()), "machine": machine(), "threads": torch.get_num_threads(),
        "versions": files.versions(),
        "weights": weights if pathlib.Path(weights).is_dir() else f"random, geometry of {weights}",
        "precision": config.mixed_precision, "matmul_flops_per_s": peak, **model, "phases": phases,
        "startup_s": starts,
    }  # fmt: skip
    print(table(result))
    if out:
        folder = pathlib.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder / "bench.txt").write_text(table(result) + "\n", encoding="utf-8")


def provide_weights(config, scratch, quick):
    """Point config to random weights where its models are not on disk -> (none were needed, flags that do the same)."""
    on_disk, flags = pathlib.Path(config.pretrained.model).is_dir(), []
    ready = on_disk and not config.reward.weights
    if not on_disk and config.pretrained.model != GEOMETRY_OF:
        raise UserError(
            f"config.pretrained.model={config.pretrained.model!r}: give a local pipeline folder; random weights are "
            f"made for {GEOMETRY_OF} alone"
        )
    if not on_disk:
        random_weights.write_pipeline(scratch / "pipeline", models.DTYPES[config.mixed_precision])
        config.pretrained.model = str(scratch / "pipeline")
        flags = [f"--config.pretrained.model={config.pretrained.model}"]
    if not quick and config.reward.weights:
        random_weights.write_clip(scratch / "clip", config.reward.model)
        config.reward.model, config.reward.weights = f"local-dir:{scratch / 'clip'}", ""
        flags += [f"--config.reward.model={config.reward.model}", "--config.reward.weights="]
    return ready, flags


def mean_interval(config):
    """Start and length of the trained interval, in steps, averaged over the run's stages."""
    stages, copy = [], config.copy_and_resolve_references()
    for copy.stage in range(config.schedule.stage_count):
        stages.append(interval_of(copy))
    return statistics.mean(first for first, _ in stages), statistics.mean(stop - first for first, stop in stages)


def prefix_share(config):
    """How much of a prefix an image pays for: its group's branches share one."""
    return 1 / config.sample.branches if METHODS[config.method][1] else 1


def measure_policy(config, scratch, budget):
    """Sampling and training with a LoRA that does something -> (facts of the model, {phase: figures}, pictures)."""
    embeds = models.embed_prompts(config, [read_prompts(config.prompts.train)[0], ""])
    unet = models.load_unet(config)
    for parameter in models.add_lora(unet, config).values():
        torch.nn.init.normal_(parameter, std=0.05)
    models.save_lora(unet, scratch / "lora")
    parameters = sum(p.numel() for name, p in unet.named_parameters() if ".lora_" not in name)
    del unet
    start, length = mean_interval(config)
    share = prefix_share(config)
    sampling, step, pictures = measure_sampling(config, embeds, scratch / "lora", start * share + length, budget)
    training = measure_training(config, embeds, scratch / "lora", step, budget)
    coded = io.BytesIO()
    pictures[0].save(coded, "png")
    latent = step[0][0]
    facts = {
        "unet_parameters": parameters,
        "latent_shape": list(latent.shape),
        "picture_size": list(pictures[0].size),
        "unet_steps_per_image": start * share + length,
        "stored_bytes_per_image": round((length + share) * latent.nbytes + 4 * length) + len(coded.getvalue()),
    }
    return facts, {"sampling": sampling, "training": training}, pictures


def measure_sampling(config, embeds, lora, steps, budget):
    """An image is `steps` guided steps with their noise, and decoding -> (figures, one step, pictures).

    The step: latents before (n, C, H, W), after (n, 1, C, H, W), log-probs (n, 1), for measure_training.
    """
    phase = {"unit": "images"}
    with peak_memory(phase):
        sampler, vae = models.load_sampler(config, embeds[-1:], lora), models.load_vae(config)
        shape, device = sampler.latent_shape, models.device()
        before = sampler.initial(torch.randn(config.sample.batch_size, *shape))
        own = embeds[:1].to(device).expand(len(before), -1, -1)

        def walk(n):
            return sampler.denoise(before[:n], own[:n], torch.randn(n, 1, *shape), [0])

        @torch.no_grad()
        def unet_alone(n):
            latents = before[:n].repeat(2, 1, 1, 1).to(sampler.unet.dtype)
            sampler.unet(latents, sampler.scheduler.timesteps[0].to(device), own[:1].expand(2 * n, -1, -1))

        batch = fitting(len(before), walk, budget)
        guided = seconds_a_call(lambda: walk(batch), budget)
        alone = seconds_a_call(lambda: unet_alone(batch), budget / 3)
        path, log_probs = walk(batch)
        finish = seconds_a_call(lambda: models.decode(vae, path[:, 0]), budget / 3)
        pictures = [Image.fromarray(picture.numpy()) for picture in models.decode(vae, path[:4, 0])]
    seconds = (steps * guided + finish) / batch
    flops = steps * count(lambda: walk(1), sampler.unet)[0] + count(lambda: models.decode(vae, path[:1, 0]), vae)[0]
    phase |= {"batch": batch, "per_s": 1 / seconds, "flops_per_s": flops / seconds}
    phase["unet_share"] = min(1.0, steps * alone / batch / seconds)
    return phase, (before[:batch], path, log_probs), pictures


def measure_training(config, embeds, lora, step, budget):
    """Forward and backward of (sample, step) pairs, as an update of ddpo_is accumulates them -> figures."""
    config.train.algorithm = "ddpo_is"
    phase = {"unit": "pairs"}
    device = models.device()
    with peak_memory(phase):
        unet, scheduler = models.load_unet(config), models.load_scheduler(config)
        parameters = models.load_lora(unet, lora).values()
        if config.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()

        def pairs_of(n):
            before, after, log_probs = (tensor[torch.arange(n) % len(tensor)] for tensor in step)
            latents, advantages = torch.cat([before[:, None], after], dim=1), torch.ones(n, device=device)
            own, negative = embeds.to(device).split(1)
            timesteps = scheduler.timesteps[:1].to(device)
            return Pairs(latents, log_probs, timesteps, advantages, own.expand(n, -1, -1), negative)

        def work(pairs):
            chosen, generator = torch.arange(len(pairs.log_probs)), torch.Generator().manual_seed(0)
            scale = loss_scale(unet, pairs, len(chosen), config)
            figures = accumulate(unet, scheduler, pairs, chosen, config, generator, scale)
            for parameter in parameters:
                parameter.grad = None
            ratios.append(figures["ratio"])

        ratios = []
        batch = fitting(config.train.batch_size, lambda n: work(pairs_of(n)), budget)
        pairs = pairs_of(batch)
        seconds = seconds_a_call(lambda: work(pairs), budget) / batch
    one = pairs_of(1)
    flops, kept = count(lambda: work(one), unet)
    phase |= {"batch": batch, "per_s": 1 / seconds, "flops_per_s": flops / seconds, "kept_bytes_per_pair": kept}
    return phase | {"first_ratio_error": max((ratio - 1).abs().max().item() for ratio in ratios)}


def measure_scoring(config, pictures, budget):
    """The reward on the sampled pictures -> figures."""
    phase = {"unit": "images"}
    prompts = read_prompts(config.prompts.train)[:8]
    with peak_memory(phase):
        reward = load_reward(config, models.device())

        def work(n):
            reward([pictures[i % len(pictures)] for i in range(n)], [prompts[i % len(prompts)] for i in range(n)])

        batch = fitting(config.reward.batch_size, work, budget)
        seconds = seconds_a_call(lambda: work(batch), budget / 3) / batch
    flops = count(lambda: work(batch), torch.nn.Module())[0] / batch
    return phase | {"batch": batch, "per_s": 1 / seconds, "flops_per_s": flops / seconds}


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
    lines = [
        f"{result['machine']}; {result['date']}",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"weights: {result['weights']}; {model}, pictures {'x'.join(map(str, result['picture_size']))}",
        f"precision {result['precision']}, {result['threads']} threads; {matmul}; "
        f"{result['unet_steps_per_image']:.2f} guided steps an image",
        "",
        "phase      batch   rate               TFLOP/s   of matmul   in the UNet   peak memory",
    ]
    for name, phase in result["phases"].items():
        rate = f"{phase['per_s']:.4g} {phase['unit']}/s"
        unet = f"{phase['unet_share']:.0%}" if "unet_share" in phase else "-"
        memory = f"{phase['peak_bytes'] / 2**20:.0f} MiB" if phase["peak_bytes"] else "-"
        lines.append(
            f"{name:<9} {phase['batch']:>6}   {rate:<17} {phase['flops_per_s'] / 1e12:>8.3f} "
            f"{phase['matmul_share']:>11.0%} {unet:>13} {memory:>13}"
        )
    training = result["phases"]["training"]
    starts = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in result["startup_s"].items())
    return "\n".join([
        *lines,
        "",
        f"start-up: {starts or 'not measured'}",
        f"stored: {result['stored_bytes_per_image'] / 1024:.1f} KiB an image; kept for the backward pass: "
        f"{training['kept_bytes_per_pair'] / 2**20:.2f} MiB a pair; first-pass |ratio - 1|: at most "
        f"{training['first_ratio_error']:.1e}",
    ])  # fmt: skip


def run(argv):
    """Command line -> main, which run_main guards."""
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", help="of config/stage_process.py; sdv1.4 with CUDA, else shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--out", default="", help="folder for bench.json and bench.txt")
    parser.add_argument("--quick", action="store_true", help="a minute: a fifth of the time for each figure")
    given, flags = parser.parse_known_args(argv[1:])
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cuda = torch.cuda.is_available()
    if given.device == "cuda" and not cuda:
        sys.exit("bench.py: --device cuda: PyTorch sees no CUDA device here")
    flags = ["--config", f"config/stage_process.py:{given.preset or ('sdv1.4' if cuda else 'shapes')}", *flags]
    sys.argv[1:] = flags
    run_main(lambda config: main(config, flags, given.out, given.quick))


if __name__ == "__main__":
    run(sys.argv)
