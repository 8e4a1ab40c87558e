"""Step 2 of a stage: score the pictures, normalise per prompt, keep the contrasts."""

import concurrent.futures
import time

import numpy as np
import torch
from PIL import Image

from . import files, metrics, models
from .configuration import METHODS, UserError
from .quality import feature_distance
from .rewards import load_reward
from .rewards.history import RewardHistory
from .sample import plan
from .selection import select_contrasts
from .shapes.oracle import verdicts
from .tracking import track


def main(config, started=None):
    """Write selected.safetensors and scores.json of config.stage; nothing to do if scores.json is there.

    started: time.perf_counter() when the step began, now unless given; its times count from there.
    """
    started = started or time.perf_counter()
    run = files.Run(config)
    log = files.start_log(run)
    run.pin(config)
    if (run.stage / "scores.json").exists():
        log.info(f"stage {config.stage} select: complete already ({run.stage / 'scores.json'})")
        return
    rows = files.read_json(run.stage / "samples.json", "run_sample.py")
    if rows != plan(config):
        raise UserError(f"{run.stage} holds the samples of another run: delete it and run run_sample.py again")
    past = files.read_json(run.previous / "scores.json", "run_select.py")["history"] if run.previous else []
    models.prepare(config)
    reward = load_reward(config, models.device())
    loaded = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor() as pool:  # decoding a large PNG takes longer than scoring it on a GPU
        images = list(pool.map(_open, [run.stage / "images" / row["image"] for row in rows]))
    prompts = [row["prompt"] for row in rows]
    raw, parts = reward.score(images, prompts)
    scoring = time.perf_counter() - loaded
    history = RewardHistory.from_state(past, config.select.history)
    normalised = history.normalise(prompts, raw)
    kept = keep(config, normalised)
    if len(raw) > 1 and raw.std() == 0:
        what = (
            f"stage {config.stage} select: {config.reward.name!r} gave all {len(raw)} images the same reward {raw[0]:g}"
        )
        if config.stage == 0:
            raise UserError(f"{what}: there is nothing to learn from; nothing was written. Look at the reward")
        log.warning(f"{what}: nothing is trained on")
        kept = []
    tensors = {"index": torch.tensor(kept, dtype=torch.int64), "normalised": torch.tensor(normalised[kept])}
    files.write_tensors(run.stage / "selected.safetensors", tensors)
    values = {
        "reward/mean": raw.mean(),
        "reward/std": raw.std(ddof=1) if len(raw) > 1 else 0.0,
        "reward/std_within_groups": within_group_std(raw.reshape(-1, config.sample.branches)),
        "reward/queries": (config.stage + 1) * len(raw),
        "select/kept": len(kept),
        "select/kept_best": int((normalised[kept] > 0).sum()),
    }
    if len(parts) > 1:
        values |= {f"reward/{name}": part.mean() for name, part in parts.items()}
    clip = next((part for name, _, part in reward.parts if name == "clip"), None)
    if clip and config.sample.groups > 1:
        values["diversity/clip"] = between_groups(clip, images, prompts, config.sample.branches)
    right = verdicts(images, prompts) if config.evaluate.oracle else None
    if right is not None:
        values["oracle/alignment"] = right.mean()
    values = {name: v if isinstance(v, int) else round(float(v), 6) for name, v in values.items()}
    values["perf/startup_s"] = round(loaded - started, 3)
    values["perf/images_per_s"] = round(len(raw) / scoring, 3)
    values["time_s"] = round(time.perf_counter() - started, 3)
    metrics.record(run.metrics, config, "select", values)
    chosen = set(kept)
    scores = [
        {**row, "reward": float(r), "normalised": float(n), "kept": i in chosen}
        for i, (row, r, n) in enumerate(zip(rows, raw, normalised, strict=True))
    ]
    files.write_json(run.stage / "scores.json", {"scores": scores, "history": history.state()})
    track(config, "select", values, log, images[:: config.sample.branches][:8])
    log.info(
        f"stage {config.stage} select: reward {raw.mean():.4f} ± {values['reward/std']:.4f}, kept {len(kept)} of "
        f"{len(raw)}" + (f", oracle {values['oracle/alignment']:.3f}" if right is not None else "")
        + f", {values['time_s']:.1f} s"
    )  # fmt: skip


def keep(config, normalised):
    """Image indices to train on: the contrasts of each branch group; without branches, every image.

    dpo compares two images, so it takes the contrasts of a prompt's independent images where there are no branches.
    """
    branches = config.sample.branches
    if not METHODS[config.method][1] and config.train.algorithm != "dpo":
        return list(range(len(normalised)))
    pairs = select_contrasts(normalised.reshape(-1, branches), config.select.pos_threshold, config.select.neg_threshold)
    return [group * branches + branch for group, branch in pairs]


def between_groups(clip, images, prompts, branches):
    """Mean CLIP-feature distance between images of one prompt and different groups: the groups' first branches."""
    features, own = clip.features(images[::branches]).cpu().numpy(), prompts[::branches]
    of_prompt = [features[[p == prompt for p in own]][None] for prompt in dict.fromkeys(own)]
    pairs = [f.shape[1] * (f.shape[1] - 1) for f in of_prompt]
    return float(np.average([feature_distance(f) for f in of_prompt], weights=pairs)) if sum(pairs) else 0.0


def within_group_std(rewards):
    """Square root of the mean within-group variance of rewards (G, K); 0 for K = 1."""
    return float(np.sqrt(rewards.var(axis=1, ddof=1).mean())) if rewards.shape[1] > 1 else 0.0


def _open(path):
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): delete the stage's folder and run it again") from None
