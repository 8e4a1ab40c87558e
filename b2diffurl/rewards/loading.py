"""Loading a published model for a reward, or saying in one line why it does not load; the precision it computes in."""

import contextlib

import torch

from ..errors import UserError


@contextlib.contextmanager
def full_float32():
    """No TF32 meanwhile: within a group scores differ in the second decimal, and its 10 bits would show."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


@contextlib.contextmanager
def reported(setting, model):
    """Errors of loading `model`, the value of config.reward.<setting>, become a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"config.reward.{setting}={model!r} does not load: {str(error).splitlines()[0]}; download that repository "
            f"from huggingface.co into a folder and give --config.reward.{setting}=FOLDER"
        ) from None


def load_model(setting, kind, model, dtype, device, unused=()):
    """A transformers model of the class `kind`, frozen, on the device; model: a hub id or a folder.

    Raises UserError where it does not load, or lacks weights other than those whose names begin with `unused`:
    transformers would make them up.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with reported(setting, model):
        loaded, found = kind.from_pretrained(model, dtype=dtype, use_safetensors=True, output_loading_info=True)
        if missing := [name for name in found["missing_keys"] if not name.startswith(tuple(unused))]:
            raise ValueError(f"it lacks {len(missing)} weights of a {kind.__name__}, {missing[0]} among them")
    return loaded.requires_grad_(False).to(device).eval()
