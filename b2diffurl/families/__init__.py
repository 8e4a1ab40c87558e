"""Model families: the only room that knows diffusers' denoisers and PEFT."""

import importlib
import pathlib
import typing

from ..errors import UserError
from ..plan import METHODS
from .loading import model_index

FAMILIES = {  # by how a pipeline's _class_name in model_index.json begins; the first that fits
    "StableDiffusionXL": "sdxl.StableDiffusionXL",
    "StableDiffusion3": "sd3.StableDiffusion3",
    "StableDiffusion": "sd.StableDiffusion",
    "Flux": "flux.Flux",
}
DISTILLED = ("schnell", "turbo", "lightning", "hyper", "lcm")  # for one to eight steps; parts of such models' names


class Family(typing.Protocol):
    """What a run asks of a kind of model; a family is built from the configuration, and loads what it is asked for."""

    evaluations: int  # of the denoiser for a guided prediction
    trained_layers: tuple  # names of the layers that get a LoRA
    component: str  # the denoiser's name in the pipeline
    geometry: object  # the denoiser without its numbers, before it is loaded
    denoiser: object  # the network that is trained, frozen but for a LoRA
    latent_shape: tuple  # (C, H, W)
    untrained: int  # last steps that have no density
    fuses: bool  # D-Fusion works in it; it then has token_spans, attentions and attention_map

    def denoiser_class(self): ...
    def text_shapes(self): ...  # -> {name: shape} of one prompt's Conditioning, before it is embedded
    def embed(self, prompts): ...  # -> Conditioning (P, ...) on the CPU
    def call(self, denoiser, latents, time, cond): ...  # -> the denoiser's output, as the latents
    def predict(self, denoiser, latents, time, cond, negative, guidance): ...  # -> guided, float32, as the latents
    def kernel(self, steps, sample): ...  # -> a Gaussian transition by step index, from the model's own scheduler
    def decode(self, latents): ...  # -> pictures (B, H, W, 3) uint8


def load_family(config):
    """The Family of config.pretrained.model. Raises UserError for a pipeline of another kind."""
    kind = model_index(config).get("_class_name", "StableDiffusionPipeline")
    kind = kind[-1] if isinstance(kind, list) else kind  # [module, class] where the pipeline brings code of its own
    chosen = next((family for begin, family in FAMILIES.items() if kind.startswith(begin)), None)
    if not chosen:
        known = ", ".join(f"{begin}Pipeline" for begin in FAMILIES)
        raise UserError(
            f"config.pretrained.model={config.pretrained.model!r} is a {kind}: the families here are {known}"
        )
    own = pathlib.Path(config.pretrained.model).name.lower()
    if any(word in own.replace("_", "-").split("-") for word in DISTILLED):
        raise UserError(
            f"config.pretrained.model={config.pretrained.model!r} was distilled for few steps, and has no use for many "
            "random ones: take the model that it was made from"
        )
    module, _, name = chosen.partition(".")
    family = getattr(importlib.import_module(f".{module}", __name__), name)(config)
    if METHODS[config.method].fusion and not family.fuses:
        raise UserError(
            f"config.method={config.method} needs a UNet: in {kind}, whose attention is over text and picture at once, "
            "a fused target is a copy of its reference (docs/d-fusion/README.md)"
        )
    if config.sample.resolution:
        family.latent_shape  # noqa: B018 - one that cannot be is refused before anything is loaded
    if config.train.lora_targets:
        from .lora import check_targets

        check_targets(family.geometry, config.train.lora_targets)
    return family
