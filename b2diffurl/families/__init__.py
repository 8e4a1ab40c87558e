"""Model families: the only room that knows diffusers' denoisers and PEFT."""

import importlib
import json
import pathlib
import typing

from ..errors import UserError
from .loading import revision

FAMILIES = {"StableDiffusionPipeline": "sd.StableDiffusion"}  # by the _class_name of a pipeline's model_index.json


class Family(typing.Protocol):
    """What a run asks of a kind of model; a family is built from the configuration, and loads what it is asked for."""

    calls: int  # of the denoiser for a guided prediction
    lora_targets: tuple  # names of the layers that get a LoRA
    denoiser: object  # the network that is trained, frozen but for a LoRA
    latent_shape: tuple

    def embed(self, prompts): ...  # -> Conditioning (P, ...) on the CPU
    def predict(self, denoiser, latents, time, cond, negative, guidance): ...  # -> guided, float32, as the latents
    def kernel(self, steps, eta): ...  # -> a Gaussian transition by step index, from the model's own scheduler
    def decode(self, latents): ...  # -> pictures (B, H, W, 3) uint8


def load_family(config):
    """The Family of config.pretrained.model. Raises UserError for a pipeline of another kind."""
    model = config.pretrained.model
    index = pathlib.Path(model, "model_index.json")
    try:
        if not pathlib.Path(model).is_dir():
            from huggingface_hub import hf_hub_download

            index = pathlib.Path(hf_hub_download(model, "model_index.json", revision=revision(config)))
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"config.pretrained.model={model!r}: its model_index.json does not load: {reason}") from None
    if kind not in FAMILIES:
        raise UserError(f"config.pretrained.model={model!r} is a {kind}: the families here are {', '.join(FAMILIES)}")
    module, _, name = FAMILIES[kind].partition(".")
    return getattr(importlib.import_module(f".{module}", __name__), name)(config)
