"""Step 3 of a stage: update the LoRA on the current interval with the selected trajectories."""

import hashlib
import json
import time

import torch
from safetensors import SafetensorError, safe_open

from .. import adam, models
from ..errors import UserError
from ..families import lora
from ..losses import weigh_advantages
from ..noise import stream_seed
from ..report import curves
from ..run import metrics, processes, storage
from ..run.config import interval_of
from ..run.folder import Run, flat, prune, require_checkpoint, start_log, that_matter
from ..run.tracking import track
from ..update import Pairs, PolicyMismatch, count_updates, pretrained_means, train_updates
from ..value import Baseline

HEADROOM = "loss_scale.headroom"  # the name of its tensor beside AdamW's state
NOTHING_SELECTED = {
    "train/updates": 0, "train/loss": 0.0, "train/lora_change": 0.0, "train/grad_norm": 0.0, "train/grad_norm_max": 0.0,
    "policy/ratio_first": 1.0, "policy/ratio_first_error": 0.0, "policy/prediction_error": 0.0, "policy/clipfrac": 0.0,
    "policy/approx_kl": 0.0, "perf/unet_evals": 0, "perf/pairs_per_s": 0.0,
}  # fmt: skip


def main(config, started=None, loaded=None):
    """Write checkpoints/checkpoint_0 (before) and checkpoint_1 (after) of config.stage, unless they are there.

    started: time.perf_counter() when the step began, now unless given; its times count from there.
    loaded: the Models of a whole run, this step's own unless given.
    """
    started = started or time.perf_counter()
    run = Run(config)
    log = start_log(run)
    run.pin(config)
    target = run.stage / "checkpoints"
    if processes.first(target.exists()):
        log.info(f"stage {config.stage} train: complete already ({target})")
        return
    storage.read_json(run.stage / "scores.json", "run_select.py")
    selected = storage.read_tensors(run.stage / "selected.safetensors", "run_select.py")
    if selected.keys() != {"index", "normalised"}:
        raise UserError(f"{run.stage} holds files of another run: delete it and run all steps of the stage again")
    before = require_checkpoint(run.previous) if run.previous else None
    loaded = loaded or models.Models(config)
    unet, parameters = loaded.trainable(before)
    optimizer, headroom = build_optimizer(config, parameters), 1.0
    if before:
        stored = storage.read_tensors(before / "optimizer.safetensors", "run_train.py")
        adam.restore(optimizer, parameters, stored)
        headroom = stored[HEADROOM].item() if HEADROOM in stored else 1.0
    baseline = Baseline(config, unet) if config.train.value_baseline else None
    if before and baseline:
        baseline.load(before / "value.safetensors")
    ready = time.perf_counter()
    first = processes.rank() == 0
    with storage.fresh_folder(target) as folder:
        if first:
            save_checkpoint(config, unet, optimizer, headroom, folder / "checkpoint_0")
        values, headroom = _train(config, run, selected, unet, loaded.scheduler, optimizer, headroom, baseline)
        if first:
            save_checkpoint(config, unet, optimizer, headroom, folder / "checkpoint_1")
            if baseline:
                baseline.save(folder / "checkpoint_1/value.safetensors")
            values["perf/startup_s"] = round(ready - started, 3)
            values["time_s"] = round(time.perf_counter() - started, 3)
            metrics.record(run.metrics, config, "train", values)
    processes.barrier()
    if not first:
        return
    prune(run, config)
    track(config, "train", values, log)
    curves.draw(run)
    if values["train/updates"]:
        log.info(
            f"stage {config.stage} train: {values['train/updates']} updates, loss {values['train/loss']:.5f}, "
            f"ratio {values['policy/ratio_first']:.6f} at first, clipped {values['policy/clipfrac']:.3f}, "
            f"grad norm {values['train/grad_norm']:.4f}, {values['time_s']:.1f} s"
        )
    else:
        why = "nothing was selected in this stage"
        if count := len(trained_positions(config, selected["index"])):
            why = f"{count} selected trajectories in {config.train.num_epochs} epochs do not fill an update of "
            why += f"config.train.trajectories_per_update={config.train.trajectories_per_update}"
        log.info(f"stage {config.stage} train: {why}; the LoRA stays as it is")


def trained_positions(config, index):
    """Positions in the selection that are trained on: all; for dpo the winners, then their losers.

    index: (n,) images, by group, best before worst. dpo leaves out groups that kept only one of the two.
    """
    if config.train.algorithm != "dpo":
        return torch.arange(len(index))
    groups = index // config.sample.branches
    winners = ((groups[1:] == groups[:-1]) & (index[1:] != index[:-1])).nonzero()[:, 0]
    return torch.cat([winners, winners + 1])


def load_pairs(config, run, index, normalised, device):
    """The trajectories of the images `index` (n,) with their normalised rewards; only these rows are read."""
    with safe_open(run.stage / "samples.safetensors", framework="pt") as stored:
        latents, log_probs = stored.get_slice("latents"), stored.get_slice("log_probs")
        starts, rows = stored.get_tensor("start_latents"), index.tolist()
        images = latents.get_shape()[0]
        if images != config.sample.groups * config.sample.branches or not 0 <= min(rows) <= max(rows) < images:
            raise UserError(f"{run.stage} holds files of another run: delete it and run all steps of the stage again")
        roots = index // (latents.get_shape()[0] // len(starts))
        return Pairs(
            latents=torch.cat([starts[roots][:, None], torch.cat([latents[i : i + 1] for i in rows])], dim=1).to(
                device
            ),
            log_probs=torch.cat([log_probs[i : i + 1] for i in rows]).to(device),
            timesteps=stored.get_tensor("timesteps").to(device),
            advantages=weigh_advantages(
                normalised.float(), config.train.adv_clip, config.train.beta1, config.train.beta2
            ).to(device),
            embeds=stored.get_tensor("prompt_embeds")[stored.get_tensor("prompt_index")[index]].to(device),
            negative_embeds=stored.get_tensor("negative_embeds").to(device),
        )


def _train(config, run, selected, unet, scheduler, optimizer, headroom, baseline):
    """Train on the selection; -> the metrics of the step, and the loss scale's headroom."""
    from tqdm import tqdm

    positions = trained_positions(config, selected["index"])
    counts = count_updates(config, len(positions)) if len(positions) else {"epoch": 0, "stage": 0}
    planned = {f"train/updates_by_{unit}": count for unit, count in counts.items()}
    if not counts[config.train.accumulate_over]:
        return {**NOTHING_SELECTED, **planned}, headroom
    index, normalised = selected["index"][positions], selected["normalised"][positions]
    try:
        pairs = load_pairs(config, run, index, normalised, unet.device)
    except (OSError, SafetensorError) as error:
        path = run.stage / "samples.safetensors"
        raise UserError(f"{path} is broken ({error}): delete the stage's folder and run it again") from None
    began, updates = time.perf_counter(), []
    parameters = [*lora.parameters(unet).values()]
    before = [parameter.detach().clone() for parameter in parameters]
    if config.train.algorithm == "dpok":
        pairs.pretrained_means = pretrained_means(unet, scheduler, pairs, config)
        pairs.baselines = baseline.of(pairs) if baseline else None
    generator = torch.Generator().manual_seed(stream_seed(config.seed, config.stage, "all", "training"))
    total = counts[config.train.accumulate_over]
    with tqdm(total=total, desc=f"stage {config.stage} train", unit="update", leave=False, disable=None) as bar:

        def on_update(statistics, norm):
            updates.append({name: value.float().mean().item() for name, value in statistics.items()})
            updates[-1]["grad_norm"] = norm
            updates[-1]["ratio_error"] = (statistics["ratio"] - 1).abs().max().item()
            bar.update()

        try:
            seen, headroom = train_updates(
                unet, scheduler, optimizer, parameters, pairs, config, generator, on_update, headroom
            )
        except FloatingPointError as error:
            raise UserError(
                f"stage {config.stage} update {len(updates)}: {error}; the stage was not saved. Lower "
                f"config.train.learning_rate={config.train.learning_rate} under a new config.exp_name"
            ) from None
        except PolicyMismatch as error:
            raise UserError(f"stage {config.stage} of {run.folder}, not trained: {error}") from None
    change = _changed(config, parameters, before)
    mean = {name: sum(u[name] for u in updates) / len(updates) for name in updates[-1]}
    if baseline:
        mean["value_loss"] = baseline.fit(pairs, config.train.value_epochs, generator)
    values = {
        "train/updates": len(updates),
        **planned,
        "train/loss": mean["loss"],
        "train/lora_change": change,
        "train/grad_norm": mean["grad_norm"],
        "train/grad_norm_max": max(u["grad_norm"] for u in updates),
        "policy/ratio_first": updates[0]["ratio"],
        "policy/ratio_first_error": updates[0]["ratio_error"],
        "policy/prediction_error": updates[0]["prediction_error"],
        "policy/clipfrac": mean["clipped"],
        "policy/approx_kl": mean["approx_kl"],
        **{f"policy/{name}": mean[name] for name in ("kl_pretrained", "preferred") if name in mean},
        **({"train/value_loss": mean["value_loss"]} if baseline else {}),
        "perf/unet_evals": 2 * (seen + (pairs.log_probs.numel() if config.train.algorithm == "dpok" else 0)),
        "perf/pairs_per_s": round(seen / (time.perf_counter() - began), 3),
    }
    return values, headroom


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
    start, stop = interval_of(config)
    settings = {name: value for name, value in that_matter(flat(config)).items() if name != "exp_name"}
    return {
        "base_model": config.pretrained.model,
        "base_revision": models.revision(config),
        "stage": str(config.stage),
        "interval": f"{start}:{stop} of {config.sample.num_steps}",
        "config_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    }


def build_optimizer(config, parameters):
    """AdamW over the LoRA parameters, {name: float32 parameter}; a linear learning rate falls stage by stage to 0."""
    train = config.train
    left = 1 - config.stage / config.schedule.stage_count if train.lr_schedule == "linear" else 1.0
    return torch.optim.AdamW(
        parameters.values(),
        lr=train.learning_rate * left,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.adam_weight_decay,
    )


def save_checkpoint(config, unet, optimizer, headroom, folder):
    """The LoRA in diffusers' form with what made it as metadata; AdamW's state and the loss scale's headroom."""
    folder.mkdir()
    lora.save(unet, folder, provenance(config))
    state = adam.state_of(optimizer, lora.parameters(unet)) | {HEADROOM: torch.tensor(headroom)}
    storage.write_tensors(folder / "optimizer.safetensors", state)
