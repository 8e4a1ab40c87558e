"""Files that are whole or not there: written aside first, then renamed."""

import contextlib
import json
import os
import re
import shutil

from ..errors import UserError
from . import processes


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


def read_json(path, step="", key=None, mend=""):
    """A JSON file, or what it has under a key; UserError if it is missing or broken, which names the way out.

    step: the script that makes it, of an earlier step; mend: the way out for a file that is no step's.
    """
    mend = mend or f"delete the stage's folder and run {step} again"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if key is None else found[key]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run {step} on this stage first") from None
    except (KeyError, TypeError):
        raise UserError(f"{path} is not what {step} writes: {mend}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken ({error}): {mend}") from None


@contextlib.contextmanager
def fresh_folder(target):
    """A scratch folder beside `target` that becomes it, whole, when the block ends without an error in any process."""
    aside = target.with_name(target.name + ".tmp")
    if processes.rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    processes.barrier()
    yield aside
    processes.barrier()
    if processes.rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    processes.barrier()  # after the block all processes find it


def join_shares(folder, tensors):
    """Every process's {name: tensor}, joined along the first dimension, for process 0; a process may have none.

    They go through files below the folder, which all processes share.
    """
    import torch

    there = processes.gather(bool(tensors))
    if len(there) == 1:
        return tensors
    if tensors:
        write_tensors(folder / f"share{processes.rank()}.safetensors", tensors)
    processes.barrier()
    if processes.rank():
        return None
    paths = [folder / f"share{number}.safetensors" for number, own in enumerate(there) if own]
    stored = [read_tensors(path, "run_sample.py") for path in paths]
    for path in folder.glob("share*.safetensors"):  # those of an interrupted try with more processes too
        path.unlink()
    return {name: torch.cat([share[name] for share in stored]) for name in stored[0]}
