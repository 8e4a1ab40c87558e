"""Loading the parts of a pipeline: from where, in which precision, and in one line why not."""

import json
import pathlib

import torch

from ..errors import UserError
from ..run.processes import device
from . import sharding

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMMITS = {  # a commit that is in the cache is loaded without a request, and cannot change during a run
    "CompVis/stable-diffusion-v1-4": "133a221b8aa7292a167afc5127cb63fb5005638b",
}


def revision(config):
    """The revision of a hub id: config.pretrained.revision, or where that is "" the known commit, or "main"."""
    return config.pretrained.revision or COMMITS.get(config.pretrained.model, "main")


def model_index(config):
    """What config.pretrained.model's model_index.json says; nothing where a hub's cannot be had, as from a cache.

    Raises UserError for a folder's that cannot be read.
    """
    model = config.pretrained.model
    index = pathlib.Path(model, "model_index.json")
    if not pathlib.Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            index = pathlib.Path(hf_hub_download(model, "model_index.json", revision=revision(config)))
        except (OSError, ValueError):
            return {}
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"config.pretrained.model={model!r}: its model_index.json does not load: {reason}") from None
    return found


def load(loader, config, subfolder, **options):
    """loader.from_pretrained of a subfolder of config.pretrained.model. Raises UserError where it does not load."""
    return _read(loader.from_pretrained, config, subfolder, **options)


def load_geometry(loader, config, subfolder, dtype=torch.float32):
    """A network without its numbers, on the meta device: its configuration and its sizes, at once and for no memory."""
    settings, usual = _read(loader.load_config, config, subfolder), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return loader.from_config(settings)
    finally:
        torch.set_default_dtype(usual)


def _read(reader, config, subfolder, **options):
    from safetensors import SafetensorError

    model = config.pretrained.model
    where = {} if pathlib.Path(model).is_dir() else {"revision": revision(config)}
    try:
        return reader(model, subfolder=subfolder, **where, **options)
    except (OSError, ValueError, NotImplementedError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"config.pretrained.model={model!r}: its {subfolder} does not load: {reason}") from None


def load_frozen(loader, config, subfolder, dtype=None):
    """The same for a network: frozen, in dtype or the run's precision, on the run's device."""
    model = _frozen(loader, config, subfolder, dtype)
    # channels_last is the layout that the fast convolutions of CPU and GPU want; it moves no number
    return model.to(device(), memory_format=torch.channels_last)


def load_sharded(loader, config, subfolder):
    """The same in parts, one on the device of every process: see sharding.py."""
    return sharding.shard(_frozen(loader, config, subfolder))


def _frozen(loader, config, subfolder, dtype=None):
    dtype = dtype or DTYPES[config.mixed_precision]
    model, found = load(loader, config, subfolder, torch_dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise UserError(
            f"config.pretrained.model={config.pretrained.model!r}: its {subfolder} lacks {len(missing)} weights of a "
            f"{loader.__name__}, {missing[0]} among them"
        )
    return model.requires_grad_(False).eval()
