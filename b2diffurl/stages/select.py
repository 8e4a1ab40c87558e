"""Step 2 of a stage: score the pictures, normalise per prompt, keep the contrasts."""

import concurrent.futures
import time

import numpy as np
import torch
from PIL import Image

from .. import models
from ..errors import UserError
from ..evaluate.measures import feature_distance
from ..rewards.history import RewardHistory
from ..run import metrics, processes, storage
from ..run.config import METHODS
from ..run.folder import Run, start_log
from ..run.tracking import track
from ..selection import select_contrasts
from ..shapes.oracle import verdicts
from .sample import plan


def main(config, started=None, loaded=None):
    """Write selected.safetensors and scores.json of config.stage; nothing to do if scores.json is there.

    started: time.perf_counter() when the step began, now unless given; its times count from there.
    loaded: the Models of a whole run, this step's own unless given.
    """
    started = started or time.perf_counter()
    run = Run(config)
    log = start_log(run)
    run.pin(config)
    if processes.first((run.stage / "scores.json").exists()):
        log.info(f"stage {config.stage} select: complete already ({run.stage / 'scores.json'})")
        return
    rows = storage.read_json(run.stage / "samples.json", "run_sample.py")
    if rows != plan(config):
        raise UserError(f"{run.stage} holds the samples of another run: delete it and run run_sample.py again")
    past = _history(run.previous / "scores.json") if run.previous else []
    loaded = loaded or models.Models(config)
    with loaded.scoring() as reward:
        ready = time.perf_counter()
        raw, parts, measured, shown = _score(config, run, rows, reward)
        scoring = time.perf_counter() - ready

    def conclude():
        if processes.rank():
            return
        normalised, history, kept, values = _select(config, rows, raw, parts, past, log)
        values |= measured
        values = {name: v if isinstance(v, int) else round(float(v), 6) for name, v in values.items()}
        values["perf/startup_s"] = round(ready - started, 3)
        values["perf/images_per_s"] = round(len(raw) / scoring, 3)
        values["time_s"] = round(time.perf_counter() - started, 3)
        _write(config, run, rows, raw, normalised, history, kept, values)
        track(config, "select", values, log, shown)
        log.info(
            f"stage {config.stage} select: reward {raw.mean():.4f} ± {values['reward/std']:.4f}, kept {len(kept)} of "
            f"{len(raw)}" + (f", oracle {values['oracle/alignment']:.3f}" if "oracle/alignment" in values else "")
            + f", {values['time_s']:.1f} s"
        )  # fmt: skip

    processes.agree(conclude)


def _history(path):
    """The RewardHistory state that an earlier stage's scores.json holds."""
    try:
        return storage.read_json(path, "run_select.py")["history"]
    except (KeyError, TypeError):
        raise UserError(
            f"{path} is not what run_select.py writes: delete that stage's folder and run it again"
        ) from None


def _score(config, run, rows, reward):
    """-> rewards (N,), {part: rewards (N,)}, {figure beside the reward: value}, a few PIL images to show.

    Every process reads, scores and measures its own part of the images.
    """
    mine, branches, shown = processes.part(len(rows)), config.sample.branches, []
    own = rows[mine]
    prompts = [row["prompt"] for row in own]
    clip = next((part for name, _, part in reward.parts if name == "clip"), None)

    def work():
        with concurrent.futures.ThreadPoolExecutor() as pool:  # decoding a large PNG takes longer than scoring it
            images = [*pool.map(_open, [run.stage / "images" / row["image"] for row in own])]
        firsts = [image for image, row in zip(images, own, strict=True) if row["branch"] == 0]
        shown.extend(firsts[:8])
        return {
            "scores": reward.score(images, prompts) if images else None,
            "features": clip.features(firsts).cpu().numpy() if clip and firsts else None,
            "verdicts": verdicts(images, prompts) if config.evaluate.oracle and images else None,
        }

    found = processes.agree(work)
    scores, features, right = ([part[name] for part in found if part[name] is not None] for name in found[0])
    parts, values = {name: np.concatenate([own[name] for _, own in scores]) for name in scores[0][1]}, {}
    if features and config.sample.groups > 1:
        values["diversity/clip"] = between_groups(np.concatenate(features), [r["prompt"] for r in rows[::branches]])
    if sum(map(len, right)) == len(rows):  # all prompts are of the oracle's world
        values["oracle/alignment"] = np.concatenate(right).mean()
    return np.concatenate([total for total, _ in scores]), parts, values, shown


def _select(config, rows, raw, parts, past, log):
    """-> normalised rewards (N,), the history with them, kept image indices, figures."""
    history = RewardHistory.from_state(past, config.select.history)
    normalised = history.normalise([row["prompt"] for row in rows], raw)
    kept = keep(config, normalised)
    pools = [raw[[row["prompt"] == prompt for row in rows]] for prompt in {row["prompt"] for row in rows}]
    pools = [pool for pool in pools if len(pool) > 1]
    if pools and all((pool == pool[0]).all() for pool in pools):
        what = f"stage {config.stage} select: {config.reward.name!r} gave all images of a prompt the same reward"
        if config.stage == 0:
            raise UserError(f"{what}, of each prompt: there is nothing to learn from; nothing was written")
        log.warning(f"{what}, of each prompt: nothing is trained on")
        kept = []
    values = {
        "reward/mean": raw.mean(),
        "reward/std": raw.std(ddof=1) if len(raw) > 1 else 0.0,
        "reward/std_within_prompts": np.sqrt(np.mean([pool.var(ddof=1) for pool in pools])) if pools else 0.0,
        "reward/std_within_groups": within_group_std(raw.reshape(-1, config.sample.branches)),
        "reward/queries": (config.stage + 1) * len(raw),
        "select/kept": len(kept),
        "select/kept_best": int((normalised[kept] > 0).sum()),
    }
    if len(parts) > 1:
        values |= {f"reward/{name}": part.mean() for name, part in parts.items()}
    return normalised, history, kept, values


def _write(config, run, rows, raw, normalised, history, kept, values):
    """The stage's files; scores.json last, since it says that the step is complete."""
    tensors = {"index": torch.tensor(kept, dtype=torch.int64), "normalised": torch.tensor(normalised[kept])}
    storage.write_tensors(run.stage / "selected.safetensors", tensors)
    metrics.record(run.metrics, config, "select", values)
    chosen = set(kept)
    scores = [
        {**row, "reward": float(r), "normalised": float(n), "kept": i in chosen}
        for i, (row, r, n) in enumerate(zip(rows, raw, normalised, strict=True))
    ]
    storage.write_json(run.stage / "scores.json", {"scores": scores, "history": history.state()})


def keep(config, normalised):
    """Image indices to train on: the contrasts of each branch group; without branches, every image.

    dpo compares two images, so it takes the contrasts of a prompt's independent images where there are no branches.
    """
    branches = config.sample.branches
    if not METHODS[config.method][1] and config.train.algorithm != "dpo":
        return list(range(len(normalised)))
    pairs = select_contrasts(normalised.reshape(-1, branches), config.select.pos_threshold, config.select.neg_threshold)
    return [group * branches + branch for group, branch in pairs]


def between_groups(features, prompts):
    """Mean CLIP-feature distance between images of one prompt; features (G, D) and prompts of each group's first."""
    of_prompt = [features[[p == prompt for p in prompts]][None] for prompt in dict.fromkeys(prompts)]
    pairs = [f.shape[1] * (f.shape[1] - 1) for f in of_prompt]
    return float(np.average([feature_distance(f) for f in of_prompt], weights=pairs)) if sum(pairs) else 0.0


def within_group_std(rewards):
    """Square root of the mean within-group variance of rewards (G, K); 0 for K = 1."""
    return float(np.sqrt(rewards.var(axis=1, ddof=1).mean())) if rewards.shape[1] > 1 else 0.0


def _open(path):
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): delete the stage's folder and run it again") from None
