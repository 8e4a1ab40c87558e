"""Step 1 of a stage: draw prompts, denoise branch groups with the current LoRA, write pictures and trajectories."""

import concurrent.futures
import dataclasses
import time

import torch
from PIL import Image

from .. import rollout
from ..errors import UserError
from ..guidance import take, to_device
from ..models import Models
from ..noise import draw_prompts, stream_seed
from ..plan import METHODS, stage_plan
from ..prompt_weights import by_variance
from ..run import metrics, processes, storage
from ..run.folder import Run
from ..run.prompts import read_prompts
from ..run.tracking import track
from .begin import begin, steps
from .scoring import asking, history_of
from .trajectories import write_rollout


def main(config, started=None, loaded=None):
    """Write images/, samples.safetensors and samples.json of config.stage; nothing to do if samples.json is there.

    started: time.perf_counter() when the step began, now unless given; its times count from there.
    loaded: the Models of a whole run, this step's own unless given.
    """
    started, opened = started or time.perf_counter(), begin(config, "sample")
    if not opened:
        return
    run, log = opened
    before, loaded = run.require_previous(), loaded or Models(config)
    loaded.require_memory()  # of the training that follows: not found out after the sampling
    plan, rows = stage_plan(config), image_rows(config)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    of_group = torch.tensor([prompts.index(row["prompt"]) for row in rows[:: plan.images]])
    cond, policy = loaded.family.embed(prompts), loaded.policy(before)
    if config.sample.prefix == "ode":
        policy.kernel = dataclasses.replace(policy.kernel, random_from=plan.start)
    loaded.family.vae  # noqa: B018 - loading it counts as start-up
    ready = time.perf_counter()
    run.stage.mkdir(parents=True, exist_ok=True)
    groups, tensors, saving = processes.share(config.sample.groups), {}, []

    def deliver(own, pictures, copied):
        ask(pictures, copied, [row["prompt"] for row in own])
        for row, picture in zip(own, pictures, strict=True):
            saving.append(pool.submit(save, picture, copied, folder / row["image"]))

    def work():
        own = rows[groups.start * plan.images : groups.stop * plan.images]
        with policy.together():
            if own:
                tensors.update(_denoise(config, policy, plan, own, take(cond, of_group[groups]), deliver))
        for future in saving:
            future.result()

    with asking(config, run.stage / "answers", log) as ask:  # to its end, which waits: what is sampled is safe by then
        threads = concurrent.futures.ThreadPoolExecutor(4, initializer=processes.use_device)
        with storage.fresh_folder(run.stage / "images") as folder, threads as pool:
            processes.agree(work)
        times = {"started": started, "ready": ready, "sampled": time.perf_counter()}
        tensors = storage.join_shares(run.stage, tensors)
        if processes.rank() == 0:
            forest = rollout.assemble(plan, tensors["states"], tensors["log_prob"], of_group)
            write_rollout(run.stage / "samples.safetensors", forest, cond, loaded.family.embed([""]))
            values = _figures(config, plan, loaded.family.evaluations, times)
            metrics.record(run.metrics, config, "sample", values)
            storage.write_json(run.stage / "samples.json", rows)
    processes.barrier()
    if processes.rank():
        return
    values["time_s"] = round(time.perf_counter() - started, 3)  # again, with the wait for a reward server
    metrics.record(run.metrics, config, "sample", values)
    track(config, "sample", values, log)
    interval = f"last {plan.steps - plan.start} of {plan.steps} steps branch"
    if not METHODS[config.method].branches:
        interval = f"steps {plan.start} to {plan.steps - plan.untrained - 1} of {plan.steps} are trained on"
    log.info(
        f"stage {config.stage} sample: {len(rows)} images, {interval}, "
        f"{values['perf/images_per_s']:.1f} images/s, {values['time_s']:.1f} s"
        + metrics.time_left(run.metrics, config, "sample", steps(config))
    )


def _figures(config, plan, halves, times):
    """What metrics.jsonl says of the step; halves: denoiser evaluations per guided prediction.

    times: time.perf_counter() when the step `started`, was `ready` to sample, and had `sampled`.
    """
    ready, images = times["ready"], config.sample.groups * plan.images
    return {
        "interval/start": plan.start,
        "interval/length": plan.steps - plan.start,
        "sample/images": images,
        "perf/unet_evals": halves * plan.evaluations * config.sample.groups,
        "perf/startup_s": round(ready - times["started"], 3),
        "perf/images_per_s": round(images / (times["sampled"] - ready), 3),
        "time_s": round(time.perf_counter() - times["started"], 3),
    }


def image_rows(config):
    """The stage's images in order: [{image, prompt, group, branch, seed}]; group g has branches 0..K-1."""
    prompts, run, weights = read_prompts(config.prompts.train), Run(config), None
    if config.sample.prompt_weights == "variance" and run.previous:
        weights = by_variance(prompts, history_of(run.previous / "scores.json"))
    chosen = draw_prompts(config.seed, config.stage, len(prompts), config.sample.groups, weights)
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


def _denoise(config, policy, plan, rows, cond, deliver):
    """Sample the groups of the rows, whose Conditioning is cond (G, ...) -> {"states", "log_prob"} of rollout.sample.

    Pictures are decoded batch by batch; deliver(their rows, (B, H, W, 3) uint8, CUDA event or None) writes them off the
    critical path.
    """
    from tqdm import tqdm

    numbers = [row["group"] for row in rows[:: plan.images]]
    seeds = plan.seeds(config.seed, config.stage, numbers)
    bar = tqdm(total=len(rows), desc=f"stage {config.stage} sample", unit="image", leave=False, disable=None)
    with bar:

        def on_batch(first, latents):
            pictures = policy.family.decode(latents).to("cpu", non_blocking=True)
            copied = torch.cuda.Event() if latents.is_cuda else None
            if copied:
                copied.record()
            deliver(rows[first : first + len(latents)], pictures.numpy(), copied)
            bar.update(len(latents))

        cond = to_device(cond, policy.device)
        states, log_prob = rollout.sample(policy, plan, cond, seeds, config.sample.batch_size, on_batch)
    if not log_prob.isfinite().all():
        raise UserError(
            f"stage {config.stage}: the latents are not finite; nothing was written. Try config.mixed_precision="
            "no or bf16; if training had diverged, lower config.train.learning_rate under a new config.exp_name"
        )
    return {"states": states, "log_prob": log_prob}


def save(picture, copied, path):
    """Write a picture (H, W, 3) uint8 as a PNG, once the CUDA event `copied`, if there is one, has passed."""
    if copied:
        copied.synchronize()
    Image.fromarray(picture).save(path)
