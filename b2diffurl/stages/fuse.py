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
from ..rewards.answers import forget
from ..rewards.history import RewardHistory, standardise
from ..run import metrics, processes, storage
from ..run.tracking import track
from ..shapes.oracle import verdicts
from .begin import begin, steps
from .scoring import earlier_targets, history_of, read_picture, score
from .targets import Pairs, evaluations, make_targets, mask_of, pairs_of, place, word_thresholds
from .trajectories import read_images, write_credit, write_rollout

NOTHING, EVERYTHING = 0.02, 0.98  # shares of a picture: a mask beyond them selects nothing, or everything
FIGURES = {  # of metrics.jsonl: the field of fused.json that it is the mean of
    "fuse/reference_reward": "reward_reference", "fuse/base_reward": "reward_base",
    "fuse/target_reward": "reward_target",
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
    scores = storage.read_json(run.stage / "scores.json", "run_select.py", "scores")
    before, loaded, pairs = run.require_previous(), loaded or Models(config), pairs_of(config, scores)
    prompts = list(dict.fromkeys(row["prompt"] for row in scores))
    words, of_pair = word_thresholds(config, loaded.family, prompts), [prompts.index(b["prompt"]) for _, b in pairs]
    cond, policy = loaded.family.embed(prompts), loaded.policy(before)
    loaded.family.vae  # noqa: B018 - loading it counts as start-up
    ready = time.perf_counter()
    with storage.fresh_folder(run.stage / "fused") as folder:
        tensors = _make(config, run, policy, pairs, (take(cond, of_pair), words[of_pair]), folder)
    answers = run.stage / "answers"
    with loaded.scoring() as reward, reward.answers_in(answers):
        found = _score(config, run, pairs, reward) if pairs else (np.zeros(0), {}, np.zeros((0, 2)))

    def conclude():
        if processes.rank():
            return
        plan, own = stage_plan(config), pair_plan(stage_plan(config))
        table = _rows(config, pairs, found, tensors)
        rule = functools.partial(credit.targets, kept=np.array([row["kept"] for row in table], dtype=bool))
        chosen, _ = credit.assign(own, _normalised(config, run, scores, table), config, rule)
        write_credit(run.stage / "selected.safetensors", chosen)
        forest = rollout.assemble(own, tensors["states"], tensors["log_prob"], torch.tensor(of_pair, dtype=torch.long))
        write_rollout(run.stage / "fused.safetensors", forest, cond, loaded.family.embed([""]))
        values = _figures(table, found[1], tensors["kl"][:, : plan.steps - plan.untrained - plan.start]) | {
            "reward/queries": _queries(config, run, len(table)),
            "perf/unet_evals": loaded.family.evaluations * len(table) * evaluations(config, plan),
            "perf/startup_s": round(ready - started, 3),
            "time_s": round(time.perf_counter() - started, 3),
        }
        metrics.record(run.metrics, config, "fuse", values)
        storage.write_json(run.stage / "fused.json", table)  # last: the step is complete
        forget(answers)
        track(config, "fuse", values, log)
        left = metrics.time_left(run.metrics, config, "fuse", steps(config))
        log.info(f"stage {config.stage} fuse: {_summary(values)}{left}")
        _warn(config, tensors["mask_share"].numpy(), log)

    processes.agree(conclude)


def _make(config, run, policy, pairs, given, folder):
    """make_targets of every process's own share of the pairs, joined; given: Conditioning and thresholds of all."""
    plan, (cond, words), tensors = stage_plan(config), given, {}
    share = processes.share(len(pairs))
    references, bases = ([place(config, own[side]) for own in pairs[share]] for side in (0, 1))
    path = run.stage / "samples.safetensors"
    stored = read_images(path, plan, references, whole=False), read_images(path, plan, bases)
    mine = Pairs(pairs[share], {name: own[share] for name, own in cond.items()}, words[share], *stored)

    def work():
        with policy.together():
            if mine.rows:
                tensors.update(make_targets(config, policy, mine, folder))

    processes.agree(work)
    if pairs:
        return storage.join_shares(run.stage, tensors)
    own, steps = pair_plan(plan), plan.steps - plan.start
    shapes = {"states": (own.states, *policy.family.latent_shape), "log_prob": (len(own.transitions.step),)}
    return {name: torch.zeros(0, *shape) for name, shape in {**shapes, "kl": (steps,), "mask_share": ()}.items()}


def _score(config, run, pairs, reward):
    """-> the targets' rewards (N,), {name: the oracle's verdicts (N,)}, and distances (N, 2) from the base.

    The verdicts are of references, bases and targets, none where the oracle is not asked. The distances are those of
    the target and of the reference: root mean square over a picture's numbers in [0, 1].
    """
    images, prompts = run.stage / "images", [base["prompt"] for _, base in pairs]

    def compare(targets, share):
        away, right = [], []
        for target, prompt, pair in zip(targets, prompts[share], pairs[share], strict=True):
            reference, base = (read_picture(images / own["image"]) for own in pair)
            right.append(verdicts([reference, base], [prompt] * 2) if config.evaluate.oracle else None)
            target, reference, base = (np.asarray(own, dtype=np.float32) / 255 for own in (target, reference, base))
            away.append([((own - base) ** 2).mean() ** 0.5 for own in (target, reference)])
        return np.array(away), right

    paths = [run.stage / "fused" / base["image"] for _, base in pairs]
    raw, _, right, found = score(config, reward, paths, prompts, compare)
    verdict = {}
    if right is not None:
        reference, base = np.concatenate([own for _, own in found]).T
        verdict = {"reference": reference, "base": base, "target": right}
    return raw, verdict, np.concatenate([away for away, _ in found])


def _rows(config, pairs, found, tensors):
    """fused.json's rows; kept are all, or those whose target beats its base by more than the margin."""
    (raw, _, distances), kl = found, tensors["kl"].tolist()
    return [
        {
            "target": base["image"], "mask": mask_of(base), "prompt": base["prompt"], "group": base["group"],
            "reference": reference["image"], "base": base["image"], "reward_reference": reference["reward"],
            "reward_base": base["reward"], "reward_target": float(own), "mask_share": round(float(share), 4),
            "distance": round(float(near), 6), "reference_distance": round(float(far), 6),
            "kept": bool(config.fusion.keep == "all" or own - base["reward"] > config.fusion.margin),
            "kl": [round(nats, 4) for nats in apart],
        }
        for (reference, base), own, share, (near, far), apart in zip(
            pairs, raw, tensors["mask_share"], distances, kl, strict=True
        )
    ]  # fmt: skip


def _normalised(config, run, scores, table):
    """The pairs' rewards (pairs, 2), base and target, normalised as run_select.py did for their prompts."""
    history = history_of(run.previous / "scores.json") if run.previous else []
    history = RewardHistory.from_state(history, config.select.history)
    statistics, _ = history.statistics([row["prompt"] for row in scores], [row["reward"] for row in scores])
    prompts, names = [row["prompt"] for row in table], ("reward_base", "reward_target")
    rewards = [[row[name] for row in table] for name in names]
    return np.stack([standardise(prompts, own, statistics) for own in rewards], 1)


def _queries(config, run, targets):
    """Reward queries of the run so far, this step's among them."""
    images = (config.stage + 1) * config.sample.groups * config.sample.branches
    return images + earlier_targets(config, run) + targets


def _figures(table, verdict, kl):
    """What metrics.jsonl says of the targets; kl: of the trained steps, in nats."""
    values = {"fuse/targets": len(table), "fuse/kept": sum(row["kept"] for row in table)}
    if not table:
        return values
    means = {name: np.mean([row[field] for row in table]) for name, field in FIGURES.items()}
    means |= {f"fuse/{name}_oracle": own.mean() for name, own in verdict.items()}
    means |= {
        "fuse/better": np.mean([row["reward_target"] > row["reward_base"] for row in table]),
        "fuse/kl": kl.mean(),
    }
    return values | {name: round(float(value), 6) for name, value in means.items()}


def _summary(values):
    """The step's line in the log."""
    if not values["fuse/targets"]:
        return "no reference is better than a base; nothing is trained on"
    right = f", oracle {values['fuse/target_oracle']:.3f}" if "fuse/target_oracle" in values else ""
    return (
        f"{values['fuse/targets']} targets, reward {values['fuse/base_reward']:.4f} -> "
        f"{values['fuse/target_reward']:.4f} (references {values['fuse/reference_reward']:.4f}){right}, "
        f"{values['fuse/better']:.0%} beat their base, kept {values['fuse/kept']}, "
        f"masks of {values['fuse/mask_share']:.0%}, {values['time_s']:.1f} s"
    )


def _warn(config, shares, log):
    """Say in the log where most masks (N,) cover nothing, or everything and that is not what was asked for."""
    empty, full = (shares < NOTHING).mean() if len(shares) else 0, (shares > EVERYTHING).mean() if len(shares) else 0
    for share, what in ((empty, "nothing"), (full * (config.fusion.mask != "all"), "everything")):
        if share > 0.5:
            log.warning(
                f"stage {config.stage} fuse: {share:.0%} of the masks cover {what} ({shares.mean():.1%} of the "
                f"pictures): change config.fusion.threshold={config.fusion.threshold:g}"
            )
