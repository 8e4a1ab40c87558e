"""D-Fusion's step, between select and train: denoise bases again with their references fused in, score the targets."""

import functools
import time

import numpy as np
import torch

from .. import credit, rollout
from ..errors import UserError
from ..guidance import take
from ..models import Models
from ..plan import METHODS, pair_plan, stage_plan
from ..rewards.history import RewardHistory, standardise
from ..run import metrics, processes, storage
from ..run.tracking import track
from .begin import begin
from .scoring import read_picture, score
from .select import history_of
from .targets import Pairs, evaluations, make_targets, mask_of, pairs_of, place, word_thresholds
from .trajectories import read_images, write_credit, write_rollout

NOTHING, EVERYTHING = 0.02, 0.98  # shares of a picture: a mask beyond them selects nothing, or everything
FIGURES = {  # of metrics.jsonl: the field of fused.json that it is the mean of
    "fuse/reference_reward": "reference_reward", "fuse/base_reward": "base_reward", "fuse/target_reward": "reward",
    "fuse/mask_share": "mask_share", "fuse/distance": "distance", "fuse/reference_distance": "reference_distance",
}  # fmt: skip


def main(config, started=None, loaded=None):
    """Write fused/, fused.safetensors, selected.safetensors and fused.json of config.stage, unless the last is there.

    started: time.perf_counter() when the step began, now unless given; its times count from there.
    loaded: the Models of a whole run, this step's own unless given.
    """
    started, opened = started or time.perf_counter(), begin(config, "fuse")
    if not opened:
        return
    if not METHODS[config.method].fusion:
        raise UserError(f"config.method={config.method} fuses nothing: run_train.py is next")
    run, log = opened
    scores = storage.read_json(run.stage / "scores.json", "run_select.py")["scores"]
    before, loaded = run.require_previous(), loaded or Models(config)
    plan, pairs = stage_plan(config), pairs_of(config, scores)
    if not pairs:
        raise UserError(f"stage {config.stage}: no reference is better than a base: look at the rewards in scores.json")
    prompts = list(dict.fromkeys(base["prompt"] for _, base in pairs))
    words, of_pair = (
        word_thresholds(config, loaded.family, prompts),
        [prompts.index(base["prompt"]) for _, base in pairs],
    )
    cond, policy = loaded.family.embed(prompts), loaded.policy(before)
    loaded.family.vae  # noqa: B018 - loading it counts as start-up
    ready, share = time.perf_counter(), processes.share(len(pairs))
    stored = read_images(
        run.stage / "samples.safetensors", plan, [place(config, r) for own in pairs[share] for r in own]
    )
    mine, tensors = Pairs(pairs[share], take(cond, of_pair[share]), words[of_pair[share]], stored), {}

    def work():
        with policy.together():
            if mine.rows:
                tensors.update(make_targets(config, policy, mine, folder))

    with storage.fresh_folder(run.stage / "fused") as folder:
        processes.agree(work)
    tensors = storage.join_shares(run.stage, tensors)
    with loaded.scoring() as reward:
        found = _score(config, run, pairs, reward)

    def conclude():
        if processes.rank():
            return
        table = _rows(pairs, found, tensors["mask_share"])
        normalised = _normalised(config, run, scores, table)
        kept = np.array([row["kept"] for row in _keep(config, table)])
        own = pair_plan(plan)
        rule = functools.partial(credit.targets, kept=kept)
        write_credit(run.stage / "selected.safetensors", credit.assign(own, normalised, config, rule)[0])
        forest = rollout.assemble(own, tensors["states"], tensors["log_prob"], torch.tensor(of_pair))
        write_rollout(run.stage / "fused.safetensors", forest, cond, loaded.family.embed([""]))
        values = _figures(table, found, scores) | {
            "fuse/kl": round(tensors["kl"][:, : -plan.untrained or None].mean().item(), 6),
            "reward/queries": _queries(config, run, len(table)),
            "perf/unet_evals": loaded.family.evaluations * len(table) * evaluations(config, plan),
            "perf/startup_s": round(ready - started, 3),
            "time_s": round(time.perf_counter() - started, 3),
        }
        metrics.record(run.metrics, config, "fuse", values)
        divergence = {plan.start + i: round(own.item(), 4) for i, own in enumerate(tensors["kl"].mean(0))}
        storage.write_json(run.stage / "fused.json", {"targets": table, "kl": divergence})
        track(config, "fuse", values, log)
        log.info(f"stage {config.stage} fuse: {_summary(values)}")
        _warn(config, values["fuse/mask_share"], log)

    processes.agree(conclude)


def _score(config, run, pairs, reward):
    """-> the targets' rewards (N,), the oracle's verdicts of them (N,) or None, and distances (N, 2) from the base.

    The distances are those of the target and of the reference: root mean square over a picture's numbers in [0, 1].
    """

    def distances(images, share):
        measured = []
        for image, pair in zip(images, pairs[share], strict=True):
            reference, base = (read_picture(run.stage / "images" / own["image"]) for own in pair)
            target, reference, base = (np.asarray(own, dtype=np.float32) / 255 for own in (image, reference, base))
            measured.append([((own - base) ** 2).mean() ** 0.5 for own in (target, reference)])
        return measured

    paths, prompts = [run.stage / "fused" / base["image"] for _, base in pairs], [base["prompt"] for _, base in pairs]
    raw, _, right, measured = score(config, reward, paths, prompts, distances)
    return raw, right, np.concatenate(measured)


def _rows(pairs, found, shares):
    """fused.json's rows, but for `kept`."""
    raw, _, distances = found
    return [
        {
            "target": base["image"], "mask": mask_of(base), "prompt": base["prompt"], "group": base["group"],
            "reference": reference["image"], "base": base["image"], "reference_reward": reference["reward"],
            "base_reward": base["reward"], "reward": float(own), "mask_share": round(float(share), 4),
            "distance": round(float(near), 6), "reference_distance": round(float(far), 6),
        }
        for (reference, base), own, share, (near, far) in zip(pairs, raw, shares, distances, strict=True)
    ]  # fmt: skip


def _keep(config, table):
    """Put `kept` into the rows: every pair, or those whose target beats its base by more than the margin."""
    for row in table:
        better = row["reward"] - row["base_reward"] > config.fusion.margin
        row["kept"] = bool(better or config.fusion.keep == "all")
    return table


def _normalised(config, run, scores, table):
    """The pairs' rewards (pairs, 2), base and target, normalised as run_select.py did for their prompts."""
    history = history_of(run.previous / "scores.json") if run.previous else []
    history = RewardHistory.from_state(history, config.select.history)
    statistics, _ = history.statistics([row["prompt"] for row in scores], [row["reward"] for row in scores])
    prompts, rewards = [row["prompt"] for row in table], [[row[n] for row in table] for n in ("base_reward", "reward")]
    return np.stack([standardise(prompts, own, statistics) for own in rewards], 1)


def _queries(config, run, targets):
    """Reward queries of the run so far, this step's among them."""
    lines = metrics.read(run.metrics)
    return targets + next(
        line["reward/queries"] for line in lines if (line["stage"], line["step"]) == (config.stage, "select")
    )


def _figures(table, found, scores):
    """What metrics.jsonl says of the targets."""
    values = {name: round(float(np.mean([row[field] for row in table])), 6) for name, field in FIGURES.items()}
    better = [row["reward"] > row["base_reward"] for row in table]
    kept = sum(row["kept"] for row in table)
    values |= {"fuse/targets": len(table), "fuse/kept": kept, "fuse/better": round(float(np.mean(better)), 6)}
    if found[1] is not None:
        values["fuse/target_oracle"] = round(float(found[1].mean()), 6)
    return values


def _summary(values):
    """The step's line in the log."""
    right = f", oracle {values['fuse/target_oracle']:.3f}" if "fuse/target_oracle" in values else ""
    return (
        f"{values['fuse/targets']} targets, reward {values['fuse/base_reward']:.4f} -> "
        f"{values['fuse/target_reward']:.4f} (references {values['fuse/reference_reward']:.4f}){right}, "
        f"{values['fuse/better']:.0%} beat their base, kept {values['fuse/kept']}, "
        f"masks of {values['fuse/mask_share']:.0%}, {values['time_s']:.1f} s"
    )


def _warn(config, share, log):
    """Say in the log where masks cover nothing or everything, unless everything is what was asked for."""
    if config.fusion.mask != "all" and not NOTHING < share < EVERYTHING:
        what = "nothing" if share < 0.5 else "everything"
        log.warning(
            f"stage {config.stage} fuse: the masks cover {what} ({share:.1%} of the pictures): "
            f"change config.fusion.threshold={config.fusion.threshold:g}"
        )
