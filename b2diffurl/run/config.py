"""Checking a configuration, all of it, before any model loads."""

import importlib.util
import math
import pathlib
import re
import urllib.parse

from ..credit import PAIRING, RULES
from ..errors import UserError
from ..flow import SAMPLERS
from ..losses import ALGORITHMS
from ..plan import METHODS
from ..prompt_weights import KINDS as PROMPT_WEIGHTS
from ..schedule import KINDS
from ..step_weights import KINDS as STEP_WEIGHTS
from ..words import MASKS
from .prompts import read_prompts

CHOICES = {
    "method": tuple(METHODS),
    "mixed_precision": ("no", "fp16", "bf16"),
    "log_with": ("", "wandb", "tensorboard", "trackio"),
    "schedule.kind": KINDS,
    "sample.sampler": SAMPLERS,
    "sample.prefix": ("sde", "ode"),
    "sample.prompt_weights": PROMPT_WEIGHTS,
    "select.credit": ("", *RULES),
    "fusion.mask": MASKS,
    "fusion.keep": ("all", "better"),
    "train.algorithm": tuple(ALGORITHMS),
    "train.dpo_reference": ("sampling", "base"),
    "train.log_prob": ("mean", "sum"),
    "train.step_weights": STEP_WEIGHTS,
    "train.accumulate_over": ("epoch", "stage"),
    "train.lr_schedule": ("constant", "linear"),
}
AT_LEAST = {
    "schedule.stage_count": 1, "schedule.left": 1, "schedule.untrained": 0, "sample.num_steps": 1, "sample.groups": 1,
    "sample.branches": 1, "sample.batch_size": 1, "reward.batch_size": 1, "select.history": 0, "train.batch_size": 1,
    "train.kl_weight": 0, "train.trajectories_per_update": 1, "train.num_epochs": 1, "train.value_epochs": 1,
    "train.lora_rank": 1, "train.target_kl": 0, "evaluate.images_per_prompt": 1, "keep.images": 0,
    "keep.trajectories": 0, "keep.optimiser": 0, "sample.resolution": 0, "pretrained.max_sequence_length": 0,
    "schedule.plateau": 0, "evaluate.num_steps": 0, "evaluate.resolution": 0, "fusion.first_step": 0,
    "fusion.threshold": 0, "train.adam_weight_decay": 0, "train.adam_epsilon": 0,
}  # fmt: skip
ABOVE_0 = (
    "sample.eta", "sample.noise_level", "train.learning_rate", "train.clip_range", "train.max_grad_norm",
    "train.adv_clip", "train.dpo_beta", "train.value_learning_rate",
    "reward.timeout",
)  # fmt: skip
FINITE = (
    "sample.guidance_scale", "select.pos_threshold", "select.neg_threshold", "train.positive_weight",
    "train.negative_weight", "train.kl_weight", "train.target_kl", "evaluate.guidance_scale",
    "fusion.threshold", "fusion.margin", "train.adam_weight_decay", "train.adam_epsilon",
)  # fmt: skip
BELOW_1 = ("train.ema_decay", "train.dpo_clip_range", "train.adam_beta1", "train.adam_beta2")
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


def check(config):
    """Raise UserError for the first value that no run could work with, missing files included."""
    name = config.exp_name
    plain = name == name.strip() and name.isprintable() and "/" not in name and not name.startswith(".")
    _require(name and plain and len(name.encode()) <= 200, "exp_name", name, "must be a plain folder name")
    for field, words in CHOICES.items():
        value = _get(config, field)
        _require(value in words, field, value, f"must be one of {', '.join(word or repr(word) for word in words)}")
    _require(not config.save_path.startswith("~"), "save_path", config.save_path, "must be a path; write $HOME for ~")
    _check_numbers(config)
    _check_algorithm(config)
    _check_reward(config.reward)
    _check_schedule(config)
    _check_forks(config)
    _check_fusion(config)
    read_prompts(config.prompts.train)
    read_prompts(config.prompts.test)
    _check_model_folder("pretrained.model", config.pretrained.model, "model_index.json")
    if config.reward.model.startswith("local-dir:"):
        _check_model_folder("reward.model", config.reward.model.removeprefix("local-dir:"), "open_clip_config.json")


def _get(config, field):
    for name in field.split("."):
        config = config[name]
    return config


def _check_numbers(config):
    for field in FINITE:
        _require(math.isfinite(_get(config, field)), field, _get(config, field), "must be a finite number")
    for field, low in AT_LEAST.items():
        _require(_get(config, field) >= low, field, _get(config, field), f"must be at least {low}")
    for field in ABOVE_0:
        value = _get(config, field)
        _require(math.isfinite(value) and value > 0, field, value, "must be a finite number above 0")
    for field in BELOW_1:
        _require(0 <= _get(config, field) < 1, field, _get(config, field), "must be in [0, 1)")
    _require(config.sample.eta <= 1, "sample.eta", config.sample.eta, "must be at most 1")
    _require(-(2**63) <= config.seed < 2**63, "seed", config.seed, "must fit into 64 bits")
    level, sampler = config.sample.noise_level, config.sample.sampler
    _require(level <= 1 or sampler != "cps", "sample.noise_level", level,
             f"must be at most 1 with config.sample.sampler={sampler}")  # fmt: skip
    _require(config.keep.optimiser != 1, "keep.optimiser", 1, "must be 0 or at least 2, or no stage could be repeated")


def _check_algorithm(config):
    train, name = config.train, config.train.algorithm
    algorithm = ALGORITHMS[name]
    full = config.mixed_precision == "no" and not config.allow_tf32
    wanted = "a sum magnifies the rounding of half precision and of TF32 beyond its clip; take mean (with a clip_range "
    wanted += "above that rounding, 0.02 or more), or config.mixed_precision=no with config.allow_tf32=False"
    _require(train.log_prob == "mean" or full, "train.log_prob", train.log_prob, wanted)
    others = ", ".join(name for name, other in ALGORITHMS.items() if other.pretrained)
    _require(algorithm.pretrained or not train.value_baseline, "train.value_baseline", train.value_baseline,
             f"goes with config.train.algorithm={others} alone")  # fmt: skip
    _require(not algorithm.preference or config.select.credit in PAIRING, "select.credit", config.select.credit,
             f"must be contrast or ranked: config.train.algorithm={name} compares two images")  # fmt: skip
    weights, plateau = config.sample.prompt_weights, config.schedule.plateau
    _require(weights != "variance" or config.select.history, "select.history", config.select.history,
             "must be at least 1 for config.sample.prompt_weights=variance, which looks at earlier stages")  # fmt: skip
    _require(weights != "variance" or not plateau, "schedule.plateau", plateau,
             "must be 0 for config.sample.prompt_weights=variance, where hard prompts pull the mean down")  # fmt: skip
    compares = algorithm.preference or config.select.credit == "group"
    _require(not compares or config.sample.branches >= 2, "sample.branches", config.sample.branches,
             "must be at least 2: the images of a group are compared")  # fmt: skip
    _require(config.select.credit != "ranked" or config.sample.branches >= 4, "sample.branches",
             config.sample.branches, "must be at least 4 for config.select.credit=ranked")  # fmt: skip


def _require(condition, field, value, wanted):
    if not condition:
        raise UserError(f"config.{field}={value!r}: {wanted}")


def reward_terms(name):
    """ "clip:1.0 + aesthetic:0.2" -> [("clip", 1.0), ("aesthetic", 0.2)]; a term without a weight has 1.

    What follows the last colon of a URL is a weight only after a path: http://host:8000 has a port.
    """
    terms = []
    for term in re.split(r"\+(?=\s*[A-Za-z_])", name):  # not the + of 1e+3
        head, colon, tail = term.strip().rpartition(":")
        if is_url(term.strip()) and "/" not in head.partition("//")[2]:
            head, colon, tail = "", "", term.strip()
        try:
            terms.append((head.strip(), float(tail)) if colon else (tail, 1.0))
        except ValueError:  # package.module:function
            terms.append((term.strip(), 1.0))
    return terms


def is_url(name):
    """Whether a reward is a server's."""
    return name.startswith(("http://", "https://"))


def is_function(name):
    """Whether a reward is a user's own, "package.module:function"."""
    return ":" in name and not is_url(name)


def _check_reward(reward):
    whole, terms = reward.name, reward_terms(reward.name)
    _require(len(dict(terms)) == len(terms), "reward.name", whole, "names a reward twice")
    for name, weight in terms:
        _require(math.isfinite(weight), "reward.name", whole, f"the weight of {name!r} must be a finite number")
        module, colon, function = name.partition(":")
        try:
            if is_url(name):
                found = urllib.parse.urlsplit(name).hostname
            else:
                found = name in REWARDS or (colon and function and importlib.util.find_spec(module))
        except (ImportError, ValueError):
            found = False
        wanted = f"{name!r} must be one of {', '.join(REWARDS)}, http://HOST:PORT/PATH "
        wanted += 'or "package.module:function" that Python can import'
        _require(found, "reward.name", whole, wanted)
        if name in WEIGHTS and not (name == "hpsv2" and reward.hpsv2_model.startswith("local-dir:")):
            setting, source = WEIGHTS[name]
            _require(pathlib.Path(reward[setting]).is_file(), f"reward.{setting}", reward[setting],
                     f"no such file; download {source} and save its tensors there (docs/rewards.md)")  # fmt: skip


def _check_schedule(config):
    schedule, steps = config.schedule, config.sample.num_steps
    grows = METHODS[config.method].progressive and schedule.kind == "growing"
    _require(not grows or schedule.left <= schedule.right, "schedule.left", schedule.left,
             f"must be at most config.schedule.right={schedule.right}")  # fmt: skip
    _require(schedule.right <= steps, "schedule.right", schedule.right,
             f"the interval cannot be longer than config.sample.num_steps={steps}")  # fmt: skip
    shortest = "left" if grows else "right"
    _require(schedule.untrained < schedule[shortest], "schedule.untrained", schedule.untrained,
             f"must be below config.schedule.{shortest}={schedule[shortest]}, or a stage trains nothing")  # fmt: skip
    _require(0 <= config.stage < schedule.stage_count, "stage", config.stage,
             f"must be in 0..{schedule.stage_count - 1} (config.schedule.stage_count - 1)")  # fmt: skip


def _check_forks(config):
    forks, trained = config.schedule.forks, config.sample.num_steps - config.schedule.untrained
    if not forks:
        return
    _require(all(isinstance(fork, tuple) and [type(n) for n in fork] == [int, int] for fork in forks),
             "schedule.forks", forks, "must be (step, fan-out) pairs such as ((6, 2), (10, 2), (14, 2))")  # fmt: skip
    at, fan_outs = zip(*forks, strict=True)
    _require([*at] == sorted({*at}) and at[0] >= 0 and at[-1] < trained and min(fan_outs) > 1, "schedule.forks", forks,
             f"steps must rise within 0..{trained - 1}, and fan-outs be 2 or more")  # fmt: skip
    images = math.prod(fan_outs)
    _require(images == config.sample.branches, "schedule.forks", forks,
             f"it has {images} leaves: set config.sample.branches={images}")  # fmt: skip
    _require(config.select.credit != "ranked", "schedule.forks", forks,
             "config.select.credit=ranked ranks a group's own images, not a tree's inner nodes")  # fmt: skip
    _require(METHODS[config.method].branches, "schedule.forks", forks,
             f"config.method={config.method} has no branches")  # fmt: skip


def _check_fusion(config):
    if not METHODS[config.method].fusion:
        return
    own, branches = config.fusion, config.sample.branches
    steps, algorithm = config.sample.num_steps - config.schedule.untrained, config.train.algorithm
    _require(branches >= 4, "sample.branches", branches, "must be at least 4: the best quarter are references")
    _require(config.select.credit == "", "select.credit", config.select.credit,
             f"must be '': config.method={config.method} trains on its pairs")  # fmt: skip
    _require(own.first_step < steps, "fusion.first_step", own.first_step,
             f"must be in 0..{steps - 1}, or target and base do not differ where they are trained on")  # fmt: skip
    _require(not ALGORITHMS[algorithm].on_policy, "train.algorithm", algorithm,
             f"needs what the policy itself drew, and config.method={config.method} makes targets")  # fmt: skip
    _require(own.threshold <= 1, "fusion.threshold", own.threshold, "must be at most 1")


def _check_model_folder(field, value, marker):
    """A path must exist; a hub id (owner/name, where there is no folder "owner") is left to the hub."""
    folder = pathlib.Path(value)
    hub_id = field == "pretrained.model" and value.count("/") == 1 and value[0] not in "./~"
    if not (hub_id and not folder.parent.exists()) and not (folder / marker).is_file():
        raise UserError(f"config.{field}={value!r}: no model folder (no {marker} there); give a folder or a hub id")
