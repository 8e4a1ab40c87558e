"""Where a run's files are, and how they are written: aside first, then renamed, so that no file is ever half there."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import secrets
import shutil
import sys
import time

from . import distributed, metrics
from .configuration import SharedError, UserError, read_prompts

SHARED_WITHIN = 30  # seconds until a file of one machine must be seen on the others
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "open_clip_torch")
FREE = (
    "stage",
    "one_process",
    "keep.",
    "log_with",
    "save_path",
    "sample.batch_size",
    "reward.batch_size",
    "train.batch_size",
    "train.gradient_checkpointing",
    "prompts.test",
    "evaluate.",
)


def flat(config):
    """{dotted name: value} of all settings, and the SHA-256 of the train prompts as "prompts.train_sha256"."""
    prompts = json.dumps(read_prompts(config.prompts.train))
    settings = {"prompts.train_sha256": hashlib.sha256(prompts.encode()).hexdigest()}
    for name, value in config.to_dict().items():
        settings.update({f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    return settings


def that_matter(settings):
    """Those of flat settings that a run's results depend on."""
    return {name: value for name, value in settings.items() if not name.startswith(FREE)}


def versions():
    """{name: version} of Python and of the libraries that results depend on; nothing is imported."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


class Run:
    """The paths of one run, and of its stage config.stage."""

    def __init__(self, config):
        self.folder = pathlib.Path(config.save_path) / config.exp_name
        self.stage = self.folder / f"stage{config.stage}"
        self.previous = self.folder / f"stage{config.stage - 1}" if config.stage else None
        self.log = pathlib.Path("log") / f"{config.exp_name}.log"
        self.metrics = self.folder / "metrics.jsonl"

    def check(self, config):
        """Raise UserError if the run was begun with other settings, prompts among them. Nothing is written.

        What only changes speed, reporting or the evaluation may change: see FREE.
        """
        path = self.folder / "config.json"
        if not path.exists():
            return
        stored, pinned = that_matter(read_json(path, "the run")), that_matter(flat(config))
        changed = [name for name in sorted({*stored, *pinned}) if stored.get(name) != pinned.get(name)]
        if changed:
            what = ", ".join(f"config.{name} was {stored.get(name)!r}, now {pinned.get(name)!r}" for name in changed)
            raise UserError(f"{self.folder} was started with other settings: {what}; give a new config.exp_name")

    def pin(self, config):
        """Keep configuration and versions of the run's first step; UserError if a later one is configured otherwise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if distributed.rank() == 0 and not (self.folder / "config.json").exists():
            write_json(self.folder / "versions.json", versions())
            write_json(self.folder / "config.json", flat(config))
        distributed.barrier()
        require_shared(self.folder)
        self.check(config)
        metrics.read(self.metrics)  # broken, it would be found when the step's work is done


def require_shared(folder):
    """Raise UserError unless every process sees the first one's files: one of a random name, soon.

    Otherwise each machine would work on its own copy and wait for the others' files for ever.
    """
    if distributed.size() == 1:
        return
    name = distributed.first(f".shared-{secrets.token_hex(8)}")
    if distributed.rank() == 0:
        (folder / name).touch()
    distributed.barrier()
    deadline = time.monotonic() + SHARED_WITHIN
    while not (there := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = distributed.gather((platform.node(), there))
    if distributed.rank() == 0:
        (folder / name).unlink()
    if blind := [node for node, there in seen if not there]:
        nodes = ", ".join(sorted({*blind}))
        raise SharedError(f"{folder} is another folder on {nodes}: give a config.save_path that all machines share")


def checkpoint(stage_folder):
    """The stage's final checkpoint folder: its LoRA and optimiser state after training."""
    return stage_folder / "checkpoints" / "checkpoint_1"


def require_checkpoint(stage_folder):
    """checkpoint(stage_folder), or UserError if that stage was not trained."""
    folder = checkpoint(stage_folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: stage {stage_folder.name.removeprefix('stage')} must be trained first")
    return folder


def write_json(path, value):
    """Write a JSON file atomically."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file atomically; tensors: {name: tensor}, metadata: {name: text}.

    Raises OSError as Python's own files do, for example on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    aside = path.with_name(path.name + ".tmp")
    aside.touch()
    mode = aside.stat().st_mode  # as the umask has it; safetensors makes files that nobody else can read
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, aside, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
    aside.chmod(mode)
    if metadata:
        _sort_metadata(aside)
    os.replace(aside, path)


def _sort_metadata(path):
    """Put a safetensors file's metadata into alphabetical order; it is written in a random one."""
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{path}: its header is not written as compactly as can be")
        stream.seek(8)
        stream.write(text.ljust(size))  # safetensors pads headers with spaces


PRUNED = {  # config.keep.<name> -> what goes, below a stage's folder
    "images": ["images"],
    "trajectories": ["samples.safetensors"],
    "optimiser": ["checkpoints/checkpoint_0", "checkpoints/checkpoint_1/optimizer.safetensors"],
}


def prune(run, config):
    """Delete what config.keep no longer keeps, when config.stage is complete."""
    for name, parts in PRUNED.items():
        oldest = config.stage - config.keep[name] if config.keep[name] else -1
        for stage in range(oldest + 1):
            for part in parts:
                path = run.folder / f"stage{stage}" / part
                aside = path.with_name(path.name + ".tmp")
                shutil.rmtree(aside, ignore_errors=True)
                if path.is_dir():
                    os.replace(path, aside)  # half a folder would look like a whole one
                    shutil.rmtree(aside)
                else:
                    path.unlink(missing_ok=True)


def read_tensors(path, step):
    """A safetensors file of an earlier step, whole, on the CPU; errors as those of read_json."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run {step} on this stage first") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is broken ({error}): delete the stage's folder and run {step} again") from None


def read_json(path, step):
    """A JSON file of an earlier step; UserError if it is missing or broken, naming the step that makes it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run {step} on this stage first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken ({error}): delete the stage's folder and run {step} again") from None


@contextlib.contextmanager
def fresh_folder(target):
    """A scratch folder beside `target` that becomes it, whole, when the block ends without an error in any process."""
    aside = target.with_name(target.name + ".tmp")
    if distributed.rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier()
    yield aside
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)


def join_parts(folder, tensors):
    """Every process's {name: tensor}, joined along the first dimension, for process 0; a process may have none.

    They go through files below the folder, which all processes share.
    """
    import torch

    parts = distributed.gather(bool(tensors))
    if len(parts) == 1:
        return tensors
    if tensors:
        write_tensors(folder / f"part{distributed.rank()}.safetensors", tensors)
    distributed.barrier()
    if distributed.rank():
        return None
    paths = [folder / f"part{number}.safetensors" for number, there in enumerate(parts) if there]
    stored = [read_tensors(path, "run_sample.py") for path in paths]
    for path in folder.glob("part*.safetensors"):  # those of an interrupted try with more processes too
        path.unlink()
    return {name: torch.cat([part[name] for part in stored]) for name in stored[0]}


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
    if distributed.rank():
        log.addHandler(logging.NullHandler())
        return log
    stamped = logging.FileHandler(run.log, encoding="utf-8")
    stamped.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(stamped)
    log.addHandler(logging.StreamHandler(sys.stdout))
    return log
