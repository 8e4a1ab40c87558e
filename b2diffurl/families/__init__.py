"""Model families: the only room that knows diffusers' denoisers and PEFT."""

import importlib
import typing

from ..errors import UserError
from .loading import model_index

FAMILIES = {  # by the _class_name of a pipeline's model_index.json
    "StableDiffusionPipeline": "sd.StableDiffusion",
    "StableDiffusionXLPipeline": "sdxl.StableDiffusionXL",
}


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
    model, kind = config.pretrained.model, model_index(config).get("_class_name", "pipeline without a name")
    if kind not in FAMILIES:
        raise UserError(f"config.pretrained.model={model!r} is a {kind}: the families here are {', '.join(FAMILIES)}")
    module, _, name = FAMILIES[kind].partition(".")
    return getattr(importlib.import_module(f".{module}", __name__), name)(config)
