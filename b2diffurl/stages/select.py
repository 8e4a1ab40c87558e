"""Step 2 of a stage: score the pictures, normalise per prompt, assign the credit."""

import time

import numpy as np

from ..credit import assign
from ..errors import UserError
from ..evaluate.measures import feature_distance
from ..models import Models
from ..plan import METHODS, stage_plan
from ..rewards.answers import forget
from ..rewards.history import RewardHistory
from ..run import metrics, processes, storage
from ..run.config import is_url, reward_terms
from ..run.tracking import track
from ..selection import select_pairs
from ..watch import WINDOW, parted
from .begin import begin, steps
from .sample import image_rows
from .scoring import earlier_targets, history_of, score
from .trajectories import write_credit

NEARLY_ALL = 0.95  # of the images are right: the oracle's share has little left to rise


def main(config, started=None, loaded=None):
    """Write selected.safetensors and scores.json of config.stage; nothing to do if scores.json is there.

    started: time.perf_counter() when the step began, now unless given; its times count from there.
    loaded: the Models of a whole run, this step's own unless given.
    """
    started, opened = started or time.perf_counter(), begin(config, "select")
    if not opened:
        return
    run, log = opened
    rows = storage.read_json(run.stage / "samples.json", "run_sample.py")
    if rows != image_rows(config):
        raise UserError(f"{run.stage} holds the samples of another run: delete it and run run_sample.py again")
    past = history_of(run.previous / "scores.json") if run.previous else []
    loaded = loaded or Models(config)
    answers = run.stage / "answers"
    with loaded.scoring() as reward, reward.answers_in(answers):
        ready = time.perf_counter()
        raw, terms, measured, shown = _score(config, run, rows, reward)
        scoring = time.perf_counter() - ready

    def conclude():
        if processes.rank():
            return
        history = RewardHistory.from_state(past, config.select.history)
        normalised = history.normalise([row["prompt"] for row in rows], raw)
        credit, kept = _credit(config, rows, raw, normalised, log)
        values = _figures(config, rows, raw, terms) | measured
        values["reward/queries"] += earlier_targets(config, run)
        values |= {"select/kept": int(kept.sum()), "select/kept_best": int((normalised[kept] > 0).sum())}
        values = {name: v if isinstance(v, int) else round(float(v), 6) for name, v in values.items()}
        values["perf/startup_s"] = round(ready - started, 3)
        if not any(map(is_url, terms)):  # a server has scored while run_sample.py sampled
            values["perf/images_per_s"] = round(len(raw) / scoring, 3)
        values["time_s"] = round(time.perf_counter() - started, 3)
        if credit:
            write_credit(run.stage / "selected.safetensors", credit)
        metrics.record(run.metrics, config, "select", values)
        _warn(config, metrics.read(run.metrics), log)
        scores = [
            {**row, "reward": float(r), "normalised": float(n), "kept": bool(k)}
            for row, r, n, k in zip(rows, raw, normalised, kept, strict=True)
        ]  # last, since it says that the step is complete
        storage.write_json(run.stage / "scores.json", {"scores": scores, "history": history.state()})
        forget(answers)
        track(config, "select", values, log, shown)
        log.info(
            f"stage {config.stage} select: reward {raw.mean():.4f} ± {values['reward/std']:.4f}, kept {kept.sum()} of "
            f"{len(raw)}" + (f", oracle {values['oracle/alignment']:.3f}" if "oracle/alignment" in values else "")
            + f", {values['time_s']:.1f} s" + metrics.time_left(run.metrics, config, "select", steps(config))
        )  # fmt: skip

    processes.agree(conclude)


def _warn(config, records, log):
    """Say in the log where the reward rises and the oracle, or another reward of the mix, does not."""
    lines = [line for line in records if line["step"] == "select" and line["stage"] <= config.stage]
    lines.sort(key=lambda line: line["stage"])
    names = {f"reward/{name}" for name, weight in reward_terms(config.reward.name) if weight >= 0}
    if np.mean([line.get("oracle/alignment", 1) for line in lines[-WINDOW:]]) < NEARLY_ALL:
        names.add("oracle/alignment")
    series = {name: [line[name] for line in lines if name in line] for name in sorted(names)}
    for name in parted([line["reward/mean"] for line in lines], series):
        log.warning(
            f"stage {config.stage} select: reward/mean has risen over the last {2 * WINDOW} stages and {name} has not: "
            "look at the pictures, the reward may be gamed"
        )


def _score(config, run, rows, reward):
    """-> rewards (N,), {term: rewards (N,)}, {figure beside the reward: value}, a few PIL images to show."""
    branches, shown = config.sample.branches, []
    clip = next((term for name, _, term in reward.terms if name == "clip"), None)

    def firsts(images, share):  # of groups: what is drawn of a prompt independently
        own = [image for image, row in zip(images, rows[share], strict=True) if row["branch"] == 0]
        shown.extend(own[:8])
        return clip.features(own).cpu().numpy() if clip and own else None

    paths, prompts = [run.stage / "images" / row["image"] for row in rows], [row["prompt"] for row in rows]
    raw, terms, right, features = score(config, reward, paths, prompts, firsts)
    values = {}
    if features and config.sample.groups > 1:
        apart = between_groups(np.concatenate(features), [row["prompt"] for row in rows[::branches]])
        values |= {} if apart is None else {"diversity/clip": apart}
    if right is not None:
        values["oracle/alignment"] = right.mean()
    return raw, terms, values, shown


def _credit(config, rows, raw, normalised, log):
    """The stage's Credit and its chosen images (N,); none where no prompt's images differ in reward.

    With D-Fusion run_fuse.py makes the Credit, and the chosen images are the references and the bases.
    """
    pools = [pool for pool in _pools(rows, raw) if len(pool) > 1]
    flat = bool(pools) and all((pool == pool[0]).all() for pool in pools)
    if flat:
        what = f"stage {config.stage} select: {config.reward.name!r} gave all images of a prompt the same reward"
        if config.stage == 0:
            raise UserError(
                f"{what}, of each prompt: there is nothing to learn from, and nothing was written. Give a denser "
                "reward, or more config.sample.groups or another config.seed under a new config.exp_name"
            )
        log.warning(f"{what}, of each prompt: nothing is trained on")
    if METHODS[config.method].fusion:
        kept = np.zeros((config.sample.groups, config.sample.branches), dtype=bool)
        for group, *pair in select_pairs(raw.reshape(kept.shape)):
            kept[group, pair] = True
        return None, kept.ravel()
    credit, kept = assign(stage_plan(config), normalised.reshape(-1, config.sample.branches), config)
    return (credit.none(), np.zeros_like(kept)) if flat else (credit, kept)


def _pools(rows, raw):
    """The rewards of each prompt's images, [(n,), ...]."""
    prompts = np.array([row["prompt"] for row in rows])
    return [raw[prompts == prompt] for prompt in {row["prompt"] for row in rows}]


def _figures(config, rows, raw, terms):
    """What metrics.jsonl says of the rewards."""
    pools = [pool.var(ddof=1) for pool in _pools(rows, raw) if len(pool) > 1]
    values = {
        "reward/mean": raw.mean(),
        "reward/std": raw.std(ddof=1) if len(raw) > 1 else 0.0,
        "reward/std_within_prompts": np.sqrt(np.mean(pools)) if pools else 0.0,
        "reward/std_within_groups": within_group_std(raw.reshape(-1, config.sample.branches)),
        "reward/queries": (config.stage + 1) * len(raw),
    }
    if len(terms) > 1:
        values |= {f"reward/{name}": term.mean() for name, term in terms.items()}
    return values


def between_groups(features, prompts):
    """Mean CLIP-feature distance between images of one prompt, None where no prompt has two.

    features (G, D) and prompts are of each group's first image.
    """
    of_prompt = [features[[p == prompt for p in prompts]][None] for prompt in dict.fromkeys(prompts)]
    of_prompt = [own for own in of_prompt if own.shape[1] > 1]
    counts = [own.shape[1] * (own.shape[1] - 1) for own in of_prompt]
    return float(np.average([*map(feature_distance, of_prompt)], weights=counts)) if counts else None


def within_group_std(rewards):
    """Square root of the mean within-group variance of rewards (G, K); 0 for K = 1."""
    return float(np.sqrt(rewards.var(axis=1, ddof=1).mean())) if rewards.shape[1] > 1 else 0.0
