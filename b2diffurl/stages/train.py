"""Step 3 of a stage: update the LoRA on the current interval with the selected trajectories."""

import hashlib
import json
import time

import numpy as np
import torch

from .. import adam, average
from ..average import Average
from ..credit import assign
from ..errors import UserError
from ..experience import weighted
from ..families import lora
from ..families.loading import revision
from ..first_pass import PolicyMismatch
from ..models import Models
from ..noise import stream_seed
from ..plan import METHODS, pair_plan, stage_plan
from ..run import metrics, processes, storage
from ..run.folder import flat, prune, that_matter
from ..run.tracking import track
from ..update import Learner, ask_pretrained, build_optimizer, count_updates, train_updates
from ..value import Baseline
from .begin import begin, steps
from .trajectories import as_tensors, read_credit, read_experience

HEADROOM = "loss_scale.headroom"  # the name of its tensor beside AdamW's state
NO_UPDATE = {
    "train/updates": 0, "train/loss": 0.0, "train/lora_change": 0.0, "train/grad_norm": 0.0, "train/grad_norm_max": 0.0,
    "policy/ratio_first": 1.0, "policy/ratio_first_error": 0.0, "policy/prediction_error": 0.0, "policy/clipfrac": 0.0,
    "policy/approx_kl": 0.0, "perf/unet_evals": 0, "perf/predictions_per_s": 0.0,
}  # fmt: skip


def main(config, started=None, loaded=None):
    """Write checkpoints/checkpoint_0 (before) and checkpoint_1 (after) of config.stage, unless they are there.

    started: time.perf_counter() when the step began, now unless given; its times count from there.
    loaded: the Models of a whole run, this step's own unless given.
    """
    started, opened = started or time.perf_counter(), begin(config, "train")
    if not opened:
        return
    run, log = opened
    credit, before = credit_of(config, run), run.require_previous()
    experience, negative = read_experience(*rollout_of(config, run), credit)
    loaded = loaded or Models(config)
    learner = _resume(config, *loaded.trainable(before, negative), before)
    baseline = Baseline(config, learner.policy) if config.train.value_baseline else None
    if before and baseline:
        baseline.restore(storage.read_tensors(before / "value.safetensors", "run_train.py"))
    ready, first = time.perf_counter(), processes.rank() == 0
    with storage.fresh_folder(run.stage / "checkpoints") as folder:
        if first:
            save_checkpoint(config, learner, folder / "checkpoint_0")
        try:
            values = _train(config, learner, experience.to(learner.policy.device), baseline)
        except PolicyMismatch as error:
            raise UserError(f"stage {config.stage} of {run.folder}, not trained: {error}") from None
        if first:
            save_checkpoint(config, learner, folder / "checkpoint_1")
            if baseline:
                storage.write_tensors(folder / "checkpoint_1/value.safetensors", baseline.state())
            values["perf/startup_s"] = round(ready - started, 3)
            values["time_s"] = round(time.perf_counter() - started, 3)
            metrics.record(run.metrics, config, "train", values)
    processes.barrier()
    if not first:
        return
    prune(run, config)
    track(config, "train", values, log)
    left = metrics.time_left(run.metrics, config, "train", steps(config))
    log.info(f"stage {config.stage} train: {_summary(config, values, experience.samples)}{left}")


def credit_of(config, run):
    """The stage's Credit, {name: tensor}. Raises UserError where it is missing, broken or another run's."""
    path = run.stage / "selected.safetensors"
    if METHODS[config.method].fusion:
        return read_credit(path, "run_fuse.py")
    scores = storage.read_json(run.stage / "scores.json", "run_select.py", "scores")
    stored = storage.read_tensors(path, "run_select.py")
    if stored.keys() == {"index", "normalised"}:  # of a run from before there was a Credit
        normalised = np.array([row["normalised"] for row in scores]).reshape(-1, config.sample.branches)
        credit = assign(stage_plan(config), normalised, config)[0]
        return as_tensors(credit if len(stored["index"]) else credit.none())
    return read_credit(path, "run_select.py")


def rollout_of(config, run):
    """What the stage trains on: the file, the plan of its groups, and how many they are."""
    plan = stage_plan(config)
    if not METHODS[config.method].fusion:
        return run.stage / "samples.safetensors", plan, config.sample.groups
    pairs = storage.read_json(run.stage / "fused.json", "run_fuse.py")
    return run.stage / "fused.safetensors", pair_plan(plan), len(pairs)


def _resume(config, policy, parameters, before):
    """The Learner as the checkpoint folder `before` left it, a fresh one where that is None."""
    left = 1 - config.stage / config.schedule.stage_count if config.train.lr_schedule == "linear" else 1.0
    learner = Learner(policy, build_optimizer(config.train, parameters, left))
    if config.train.ema_decay:
        learner.average = Average(parameters, config.train.ema_decay)
    if before:
        stored = storage.read_tensors(before / "optimizer.safetensors", "run_train.py")
        adam.restore(learner.optimizer, parameters, stored)
        learner.headroom = stored[HEADROOM].item() if HEADROOM in stored else 1.0
        if learner.average:
            learner.average.restore(stored)
    return learner


def _train(config, learner, experience, baseline):
    """Train on the experience -> the figures of the step."""
    from tqdm import tqdm

    train, policy = config.train, learner.policy
    counts = count_updates(train, experience.samples)
    planned, total = {f"train/updates_by_{unit}": n for unit, n in counts.items()}, counts[train.accumulate_over]
    if not total:
        return {**NO_UPDATE, **planned}
    updates = []
    before = [parameter.detach().clone() for parameter in learner.parameters]
    experience = weighted(experience, policy.kernel.gain, train.step_weights)
    asked_base = ask_pretrained(policy, experience, train)
    experience.baseline = baseline.of(experience) if baseline else None
    generator = torch.Generator().manual_seed(stream_seed(config.seed, config.stage, "all", "training"))
    began = time.perf_counter()
    with tqdm(total=total, desc=f"stage {config.stage} train", unit="update", leave=False, disable=None) as bar:

        def on_update(statistics, norm):
            updates.append({name: value.float().mean().item() for name, value in statistics.items()})
            updates[-1]["grad_norm"] = norm
            updates[-1]["ratio_error"] = (statistics["ratio"] - 1).abs().max().item()
            bar.update()

        try:
            asked = train_updates(learner, experience, train, generator, on_update)
        except FloatingPointError as error:
            raise UserError(
                f"stage {config.stage} update {len(updates)}: {error}; the stage was not saved. Lower "
                f"config.train.learning_rate={train.learning_rate} under a new config.exp_name"
            ) from None
    trained = time.perf_counter() - began
    values = _figures(updates) | planned | {"train/lora_change": _changed(config, learner.parameters, before)}
    if baseline:
        values["train/value_loss"] = baseline.fit(experience, train.value_epochs, generator)
    if asked_base:
        values["perf/unet_evals_base"] = policy.family.evaluations * asked_base
    values["perf/unet_evals"] = policy.family.evaluations * (asked + asked_base)
    values["perf/predictions_per_s"] = round(asked / trained, 3)
    return values


def _figures(updates):
    """The stage's figures of its updates, [{name: mean over an update's transitions}]."""
    mean = {name: sum(u[name] for u in updates) / len(updates) for name in updates[-1]}
    return {
        "train/updates": len(updates),
        "train/loss": mean["loss"],
        "train/grad_norm": mean["grad_norm"],
        "train/grad_norm_max": max(u["grad_norm"] for u in updates),
        "policy/ratio_first": updates[0]["ratio"],
        "policy/ratio_first_error": updates[0]["ratio_error"],
        "policy/prediction_error": updates[0]["prediction_error"],
        "policy/clipfrac": mean["clipped"],
        "policy/approx_kl": mean["approx_kl"],
        **{f"policy/{name}": mean[name] for name in ("kl_pretrained", "preferred", "base_clipped") if name in mean},
    }


def _summary(config, values, samples):
    """The step's line in the log."""
    if values["train/updates"]:
        return (
            f"{values['train/updates']} updates, loss {values['train/loss']:.5f}, "
            f"ratio {values['policy/ratio_first']:.6f} at first, clipped {values['policy/clipfrac']:.3f}, "
            f"grad norm {values['train/grad_norm']:.4f}, {values['time_s']:.1f} s"
        )
    if not samples:
        return "nothing was selected in this stage; the LoRA stays as it is"
    return (
        f"{samples} selected trajectories in {config.train.num_epochs} epochs do not fill an update of "
        f"config.train.trajectories_per_update={config.train.trajectories_per_update}; the LoRA stays as it is"
    )


def _changed(config, parameters, before):
    """The Euclidean length of the stage's change of the LoRA; UserError where it is 0, or not the same everywhere."""
    after = torch.cat([parameter.detach().flatten() for parameter in parameters]).cpu()
    digests = processes.gather(hashlib.sha256(after.numpy().tobytes()).hexdigest())
    if len(set(digests)) > 1:
        raise UserError(
            f"stage {config.stage}: the processes' LoRAs differ ({digests}); the stage was not saved. Run the same "
            "command again; if it comes back, with one process, or on GPUs of one kind"
        )
    change = (after - torch.cat([tensor.flatten() for tensor in before]).cpu()).norm().item()
    if not change > 0:
        raise UserError(
            f"stage {config.stage}: the updates did not change the LoRA; the stage was not saved. Look at the rewards "
            "in scores.json and at config.train.learning_rate"
        )
    return change


def provenance(config):
    """What a LoRA file says of itself, {name: text}: base model, stage, interval, hash of the run's settings.

    The run's name is not in it: the same settings make the same file.
    """
    plan = stage_plan(config)
    settings = {name: value for name, value in that_matter(flat(config)).items() if name != "exp_name"}
    return {
        "base_model": config.pretrained.model,
        "base_revision": revision(config),
        "stage": str(config.stage),
        "interval": f"{plan.start}:{plan.steps - plan.untrained} of {plan.steps}",
        "config_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    }


def save_checkpoint(config, learner, folder):
    """The LoRA and its average in diffusers' form with what made it as metadata; the state to go on from.

    That is AdamW's, the average's, and the loss scale's headroom.
    """
    denoiser = learner.policy.denoiser
    folder.mkdir()
    lora.save(denoiser, folder, provenance(config))
    if learner.average:
        with learner.average.in_place():
            lora.save(denoiser, folder / average.FOLDER, provenance(config))
    state = adam.state_of(learner.optimizer, lora.parameters(denoiser)) | {HEADROOM: torch.tensor(learner.headroom)}
    state |= learner.average.state() if learner.average else {}
    storage.write_tensors(folder / "optimizer.safetensors", state)
