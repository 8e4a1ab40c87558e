"""A run's folder: its paths, the settings and versions that it is pinned to, what it keeps, its log."""

import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import secrets
import shutil
import sys
import time

from ..errors import SharedError, UserError
from . import metrics, processes
from .prompts import read_metadata, read_prompts
from .storage import read_json, write_json

SHARED_WITHIN = 30  # seconds until a file of one machine must be seen on the others
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "open_clip_torch")
FREE = (
    "stage",
    "schedule.plateau",
    "one_process",
    "keep.",
    "sharded",
    "log_with",
    "save_path",
    "sample.batch_size",
    "reward.batch_size",
    "reward.timeout",
    "train.batch_size",
    "train.gradient_checkpointing",
    "prompts.test",
    "evaluate.",
)

ADDED = {  # settings that earlier runs lack, and what those did
    "schedule.forks": [], "schedule.untrained": 0, "select.credit": "", "sample.sampler": "cps",
    "sample.noise_level": 0.7, "sample.prefix": "sde", "sample.resolution": 0, "pretrained.max_sequence_length": 256,
    "sample.prompt_weights": "uniform",
    "train.step_weights": "one", "train.lora_targets": [],
    "train.ema_decay": 0.0, "train.dpo_reference": "sampling", "train.dpo_clip_range": 0.0,
    "fusion.first_step": 2, "fusion.mask": "quantile", "fusion.threshold": 0.5, "fusion.keep": "all",
    "fusion.margin": 0.0,
}  # fmt: skip
MEND = "give a new config.exp_name"
RENAMED = {"train.beta1": "train.positive_weight", "train.beta2": "train.negative_weight"}


def flat(config):
    """{dotted name: value} of all settings, and "prompts.train_sha256", of the train prompts and their metadata."""
    prompts, more = read_prompts(config.prompts.train), read_metadata(config.prompts.train)
    prompts = json.dumps([prompts, more] if more else prompts)
    settings = {"prompts.train_sha256": hashlib.sha256(prompts.encode()).hexdigest()}
    for name, value in config.to_dict().items():
        settings.update({f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    return json.loads(json.dumps(settings))  # as config.json has them


def that_matter(settings):
    """Those of flat settings that a run's results depend on."""
    return {name: value for name, value in settings.items() if not name.startswith(FREE)}


def versions():
    """{name: version} of Python and of the libraries that results depend on; nothing is imported."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def checkpoint_of(stage_folder):
    """A stage's final checkpoint folder: its LoRA and optimiser state after training."""
    return stage_folder / "checkpoints" / "checkpoint_1"


class Run:
    """The paths of one run, and of its stage config.stage."""

    def __init__(self, config):
        self.folder = pathlib.Path(config.save_path) / config.exp_name
        self.stage = self.folder / f"stage{config.stage}"
        self.previous = self.folder / f"stage{config.stage - 1}" if config.stage else None
        self.log = pathlib.Path("log") / f"{config.exp_name}.log"
        self.metrics = self.folder / "metrics.jsonl"
        self.checkpoint = checkpoint_of(self.stage)

    def require_previous(self):
        """The checkpoint that the stage begins from, None in stage 0. Raises UserError where it is missing."""
        if not self.previous:
            return None
        folder = checkpoint_of(self.previous)
        if not folder.is_dir():
            number = self.previous.name.removeprefix("stage")
            raise UserError(f"{folder} is missing: stage {number} must be trained first")
        return folder

    def check(self, config):
        """Raise UserError if the run was begun with other settings, prompts among them. Nothing is written.

        What only changes speed, reporting, the evaluation or when the run ends may change: see FREE.
        """
        path = self.folder / "config.json"
        if not path.exists():
            return
        stored = {RENAMED.get(name, name): value for name, value in read_json(path, mend=MEND).items()}
        stored, pinned = that_matter(ADDED | stored), that_matter(flat(config))
        changed = [name for name in sorted({*stored, *pinned}) if stored.get(name) != pinned.get(name)]
        if changed:
            what = ", ".join(f"config.{name} was {stored.get(name)!r}, now {pinned.get(name)!r}" for name in changed)
            raise UserError(f"{self.folder} was started with other settings: {what}; give a new config.exp_name")

    def pin(self, config):
        """Keep configuration and versions of the run's first step; UserError if a later one is configured otherwise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if processes.rank() == 0 and not (self.folder / "config.json").exists():
            write_json(self.folder / "versions.json", versions())
            write_json(self.folder / "config.json", flat(config))
        processes.barrier()
        require_shared(self.folder)
        self.check(config)
        metrics.read(self.metrics)  # broken, it would be found when the step's work is done


def require_shared(folder):
    """Raise UserError unless every process sees the first one's files: one of a random name, soon.

    Otherwise each machine would work on its own copy and wait for the others' files for ever.
    """
    if processes.size() == 1:
        return
    name = processes.first(f".shared-{secrets.token_hex(8)}")
    if processes.rank() == 0:
        (folder / name).touch()
    processes.barrier()
    deadline = time.monotonic() + SHARED_WITHIN
    while not (there := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = processes.gather((platform.node(), there))
    if processes.rank() == 0:
        (folder / name).unlink()
    if blind := [node for node, there in seen if not there]:
        nodes = ", ".join(sorted({*blind}))
        raise SharedError(f"{folder} is another folder on {nodes}: give a config.save_path that all machines share")


PRUNED = {  # config.keep.<name> -> what goes, below a stage's folder
    "images": ["images", "fused"],
    "trajectories": ["samples.safetensors", "fused.safetensors"],
    "optimiser": [
        "checkpoints/checkpoint_0",
        "checkpoints/checkpoint_1/optimizer.safetensors",
        "checkpoints/checkpoint_1/value.safetensors",
    ],
}


def prune(run, config):
    """Delete what config.keep no longer keeps, when config.stage is complete."""
    for name, names in PRUNED.items():
        oldest = config.stage - config.keep[name] if config.keep[name] else -1
        for stage in range(oldest + 1):
            for below in names:
                path = run.folder / f"stage{stage}" / below
                aside = path.with_name(path.name + ".tmp")
                shutil.rmtree(aside, ignore_errors=True)
                if path.is_dir():
                    os.replace(path, aside)  # half a folder would look like a whole one
                    shutil.rmtree(aside)
                else:
                    path.unlink(missing_ok=True)


def start_log(run):
    """Log to the terminal and to log/<exp_name>.log; returns the logger."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False  # a full disk is reported once, by the file that matters
    log = logging.getLogger("b2diffurl")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    if processes.rank():
        log.addHandler(logging.NullHandler())
        return log
    stamped = logging.FileHandler(run.log, encoding="utf-8")
    stamped.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(stamped)
    log.addHandler(logging.StreamHandler(sys.stdout))
    return log
