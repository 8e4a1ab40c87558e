"""Step 1 of a stage: draw prompts, denoise branch groups with the current LoRA, write pictures and trajectories."""

import concurrent.futures
import time

import torch
from PIL import Image

from .. import models
from ..errors import UserError
from ..noise import draw_prompts, stream_seed
from ..run import metrics, processes, storage
from ..run.config import METHODS, interval_of, read_prompts
from ..run.folder import Run, require_checkpoint, start_log
from ..run.tracking import track


def main(config, started=None, loaded=None):
    """Write images/, samples.safetensors and samples.json of config.stage; nothing to do if samples.json is there.

    started: time.perf_counter() when the step began, now unless given; its times count from there.
    loaded: the Models of a whole run, this step's own unless given.
    """
    started = started or time.perf_counter()
    run = Run(config)
    log = start_log(run)
    run.pin(config)
    if processes.first((run.stage / "samples.json").exists()):
        log.info(f"stage {config.stage} sample: complete already ({run.stage / 'samples.json'})")
        return
    loaded = loaded or models.Models(config)
    before = require_checkpoint(run.previous) if run.previous else None
    rows = plan(config)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    embeds, sampler, vae = loaded.embed(prompts), loaded.sampler(before), loaded.vae
    ready = time.perf_counter()
    run.stage.mkdir(parents=True, exist_ok=True)
    interval = interval_of(config)
    groups, tensors = processes.part(config.sample.groups), {}
    mine = rows[groups.start * config.sample.branches : groups.stop * config.sample.branches]

    def work():
        if not mine:
            return 0
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            made = _denoise(config, mine, prompts, embeds, sampler, vae, interval, folder, pool)
        if not made.log_probs.isfinite().all():
            raise UserError(
                f"stage {config.stage}: the latents are not finite; nothing was written. Try config.mixed_precision="
                "no or bf16; if training had diverged, lower config.train.learning_rate under a new config.exp_name"
            )
        tensors.update(start_latents=made.start_latents, latents=made.latents, log_probs=made.log_probs)
        return made.unet_evals

    with storage.fresh_folder(run.stage / "images") as folder:
        unet_evals = sum(processes.agree(work))
    tensors = storage.join_parts(run.stage, tensors)
    if processes.rank():
        processes.barrier()
        return
    tensors |= {
        "timesteps": sampler.scheduler.timesteps[interval[0] : interval[1]].cpu(),
        "prompt_embeds": embeds,
        "negative_embeds": loaded.embed([""]),
        "prompt_index": torch.tensor([prompts.index(row["prompt"]) for row in rows]),
    }
    storage.write_tensors(run.stage / "samples.safetensors", tensors)
    seconds = time.perf_counter() - started
    speed = len(rows) / (time.perf_counter() - ready)
    values = {
        "interval/start": interval[0],
        "interval/length": interval[1] - interval[0],
        "sample/images": len(rows),
        "perf/unet_evals": unet_evals,
        "perf/startup_s": round(ready - started, 3),
        "perf/images_per_s": round(speed, 3),
        "time_s": round(seconds, 3),
    }
    metrics.record(run.metrics, config, "sample", values)
    storage.write_json(run.stage / "samples.json", rows)
    processes.barrier()
    track(config, "sample", values, log)
    log.info(
        f"stage {config.stage} sample: {len(rows)} images, last {interval[1] - interval[0]} of {interval[1]} steps "
        f"branch, {speed:.1f} images/s, {seconds:.1f} s"
    )


def plan(config):
    """The stage's images in order: [{image, prompt, group, branch, seed}]; group g has branches 0..K-1."""
    prompts = read_prompts(config.prompts.train)
    chosen = draw_prompts(config.seed, config.stage, len(prompts), config.sample.groups)
    return [
        {
            "image": f"{group * config.sample.branches + branch:05d}.png",
            "prompt": prompts[index],
            "group": group,
            "branch": branch,
            "seed": stream_seed(config.seed, config.stage, group, branch),
        }
        for group, index in enumerate(chosen)
        for branch in range(config.sample.branches)
    ]


def _denoise(config, rows, prompts, embeds, sampler, vae, interval, folder, pool):
    """Run the sampler over the rows; pictures are decoded batch by batch and written off the critical path."""
    from tqdm import tqdm

    if METHODS[config.method][1]:  # a shared prefix for each group
        roots = rows[:: config.sample.branches]
        root_seeds = [stream_seed(config.seed, config.stage, row["group"], "prefix") for row in roots]
    else:  # every image by itself, from its own x_T
        roots = rows
        root_seeds = [stream_seed(config.seed, config.stage, r["group"], f"prefix of {r['branch']}") for r in roots]
    root_embeds = embeds[[prompts.index(row["prompt"]) for row in roots]].to(models.device())
    saving = []
    with tqdm(total=len(rows), desc=f"stage {config.stage} sample", unit="image", leave=False, disable=None) as bar:

        def on_batch(first, latents):
            pictures = models.decode(vae, latents).to("cpu", non_blocking=True)
            copied = torch.cuda.Event() if latents.is_cuda else None
            if copied:
                copied.record()
            for row, picture in zip(rows[first:], pictures.numpy(), strict=False):
                saving.append(pool.submit(save, picture, copied, folder / row["image"]))
            bar.update(len(latents))

        seeds = [row["seed"] for row in rows]
        trajectories = sampler.sample(root_embeds, root_seeds, seeds, interval, on_batch)
    for future in saving:
        future.result()
    return trajectories


def save(picture, copied, path):
    """Write a picture (H, W, 3) uint8 as a PNG, once the CUDA event `copied`, if there is one, has passed."""
    if copied:
        copied.synchronize()
    Image.fromarray(picture).save(path)
