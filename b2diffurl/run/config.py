"""Checking a configuration, all of it, before any model loads."""

import importlib.util
import json
import math
import pathlib
import re

from ..errors import UserError

METHODS = {  # method -> (backward progressive training, branches)
    "b2": (True, True),
    "ddpo_bpt": (True, False),
    "ddpo_bs": (False, True),
    "ddpo": (False, False),
}
CHOICES = {  # of config.train
    "algorithm": ("ddpo_is", "ddpo_sf", "dpok", "dpo"),
    "log_prob": ("mean", "sum"),
    "accumulate_over": ("epoch", "stage"),
    "lr_schedule": ("constant", "linear"),
}
REWARDS = (
    "clip", "bertscore", "aesthetic", "pickscore", "hpsv2", "jpeg_compressibility", "jpeg_incompressibility",
)  # fmt: skip
WEIGHTS = {  # reward -> the setting of a file that nothing downloads by itself, and where it comes from
    "aesthetic": (
        "aesthetic_head",
        "sac+logos+ava1-l14-linearMSE.pth from https://github.com/christophschuhmann/improved-aesthetic-predictor",
    ),
    "hpsv2": ("hpsv2_weights", "HPS_v2.1_compressed.pt from https://huggingface.co/xswu/HPSv2"),
}
PRECISIONS = ("no", "fp16", "bf16")


def check(config):
    """Raise UserError for the first value that no run could work with, missing files included."""
    _require(config.exp_name and "/" not in config.exp_name and not config.exp_name.startswith("."),
             "exp_name", config.exp_name, "must be a plain folder name")  # fmt: skip
    _require(config.method in METHODS, "method", config.method, f"must be one of {', '.join(METHODS)}")
    _require(config.mixed_precision in PRECISIONS, "mixed_precision", config.mixed_precision,
             f"must be one of {', '.join(PRECISIONS)}")  # fmt: skip
    _require(config.log_with in ("", "wandb"), "log_with", config.log_with, 'must be "" or "wandb"')
    reduction = config.train.log_prob
    full = config.mixed_precision == "no" and not config.allow_tf32
    wanted = "a sum magnifies the rounding of half precision and of TF32 beyond its clip; take mean (with a clip_range "
    wanted += "above that rounding, 0.02 or more), or config.mixed_precision=no with config.allow_tf32=False"
    _require(reduction == "mean" or full, "train.log_prob", reduction, wanted)
    for name in ("kl_weight", "target_kl"):
        _require(config.train[name] >= 0, f"train.{name}", config.train[name], "must be 0 or more")
    baseline = config.train.value_baseline
    _require(config.train.algorithm == "dpok" or not baseline, "train.value_baseline", baseline,
             "goes with config.train.algorithm=dpok alone")  # fmt: skip
    _require(config.keep.optimiser != 1, "keep.optimiser", 1, "must be 0 or at least 2, or no stage could be repeated")
    for field, words in CHOICES.items():
        value = config.train[field]
        _require(value in words, f"train.{field}", value, f"must be one of {', '.join(words)}")
    _check_reward(config.reward)
    at_least = {
        "schedule.stage_count": 1, "schedule.left": 1, "sample.num_steps": 1, "sample.groups": 1, "sample.branches": 1,
        "sample.batch_size": 1, "reward.batch_size": 1, "select.history": 0, "train.batch_size": 1,
        "train.trajectories_per_update": 1, "train.num_epochs": 1, "train.value_epochs": 1, "train.lora_rank": 1,
        "evaluate.images_per_prompt": 1, "keep.images": 0, "keep.trajectories": 0, "keep.optimiser": 0,
    }  # fmt: skip
    for field, low in at_least.items():
        section, name = field.split(".")
        _require(config[section][name] >= low, field, config[section][name], f"must be at least {low}")
    for field in ("sample.eta", "train.learning_rate", "train.clip_range", "train.max_grad_norm", "train.adv_clip",
                  "train.dpo_beta", "train.value_learning_rate"):  # fmt: skip
        section, name = field.split(".")
        value = config[section][name]
        _require(math.isfinite(value) and value > 0, field, value, "must be a finite number above 0")
    for section, names in {
        "sample": ("guidance_scale",), "select": ("pos_threshold", "neg_threshold"),
        "train": ("beta1", "beta2", "kl_weight", "target_kl"),
    }.items():  # fmt: skip
        for name in names:
            value = config[section][name]
            _require(math.isfinite(value), f"{section}.{name}", value, "must be a finite number")
    _require(config.sample.eta <= 1, "sample.eta", config.sample.eta, "must be at most 1")
    _check_schedule(config)
    read_prompts(config.prompts.train)
    read_prompts(config.prompts.test)
    _check_model_folder("pretrained.model", config.pretrained.model, "model_index.json")
    if config.reward.model.startswith("local-dir:"):
        _check_model_folder("reward.model", config.reward.model.removeprefix("local-dir:"), "open_clip_config.json")


def _require(condition, field, value, wanted):
    if not condition:
        raise UserError(f"config.{field}={value!r}: {wanted}")


def reward_parts(name):
    """ "clip:1.0 + aesthetic:0.2" -> [("clip", 1.0), ("aesthetic", 0.2)]; a part without a weight has 1."""
    parts = []
    for part in re.split(r"\+(?=\s*[A-Za-z_])", name):  # not the + of 1e+3
        head, colon, tail = part.strip().rpartition(":")
        try:
            parts.append((head.strip(), float(tail)) if colon else (tail, 1.0))
        except ValueError:  # package.module:function
            parts.append((part.strip(), 1.0))
    return parts


def _check_reward(reward):
    whole, parts = reward.name, reward_parts(reward.name)
    _require(len(dict(parts)) == len(parts), "reward.name", whole, "names a reward twice")
    for name, weight in parts:
        _require(math.isfinite(weight), "reward.name", whole, f"the weight of {name!r} must be a finite number")
        module, colon, function = name.partition(":")
        try:
            found = name in REWARDS or (colon and function and importlib.util.find_spec(module))
        except (ImportError, ValueError):
            found = False
        wanted = f'{name!r} must be one of {", ".join(REWARDS)} or "package.module:function" that Python can import'
        _require(found, "reward.name", whole, wanted)
        if name in WEIGHTS and not (name == "hpsv2" and reward.hpsv2_model.startswith("local-dir:")):
            setting, source = WEIGHTS[name]
            _require(pathlib.Path(reward[setting]).is_file(), f"reward.{setting}", reward[setting],
                     f"no such file; download {source} and save its tensors there (README, Rewards)")  # fmt: skip


def _check_schedule(config):
    from ..schedule import KINDS

    schedule, steps = config.schedule, config.sample.num_steps
    _require(schedule.kind in KINDS, "schedule.kind", schedule.kind, f"must be one of {', '.join(KINDS)}")
    _require(schedule.left <= schedule.right, "schedule.left", schedule.left,
             f"must be at most config.schedule.right={schedule.right}")  # fmt: skip
    _require(schedule.right <= steps, "schedule.right", schedule.right,
             f"the interval cannot be longer than config.sample.num_steps={steps}")  # fmt: skip
    _require(0 <= config.stage < schedule.stage_count, "stage", config.stage,
             f"must be in 0..{schedule.stage_count - 1} (config.schedule.stage_count - 1)")  # fmt: skip


def _check_model_folder(field, value, marker):
    """A path must exist; a hub id (owner/name, where there is no folder "owner") is left to the hub."""
    folder = pathlib.Path(value)
    hub_id = field == "pretrained.model" and value.count("/") == 1 and value[0] not in "./~"
    if not (hub_id and not folder.parent.exists()) and not (folder / marker).is_file():
        raise UserError(f"config.{field}={value!r}: no model folder (no {marker} there); give a folder or a hub id")


def read_prompts(path):
    """A prompt file, a JSON array of non-empty strings -> list. Raises UserError naming the file."""
    try:
        prompts = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"prompt file {path} does not exist; set config.prompts.train and config.prompts.test"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read as JSON: {error}") from None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise UserError(f'prompt file {path} must hold a JSON array of one or more non-empty strings, like ["a cat"]')
    return prompts


def interval_of(config):
    """(start, stop) of the denoising steps that config.stage trains; without progressive training, always `right`."""
    from ..schedule import interval

    kind = config.schedule.kind if METHODS[config.method][0] else "constant"
    schedule = config.schedule
    return interval(kind, config.stage, schedule.stage_count, schedule.left, schedule.right, config.sample.num_steps)
