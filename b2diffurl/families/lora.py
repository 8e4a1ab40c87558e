"""The LoRA of the denoiser: attached, loaded, computed, saved as stock diffusers reads it."""

import functools
import os
import pathlib

import torch

from ..errors import UserError
from ..run import storage


def add(denoiser, targets, rank, seed):
    """Attach a fresh LoRA to the layers `targets`: down-projection N(0, 1/rank²), up-projection zero, scale 1.

    targets: ends of the layers' names. -> {name: parameter}, float32 and trainable. Raises UserError for a target that
    no layer has.
    """
    from peft import LoraConfig

    check_targets(denoiser, targets)
    torch.manual_seed(seed)
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=[*targets]))
    return _trainable(denoiser)


def check_targets(denoiser, targets):
    """Raise UserError for a target that no linear layer of the denoiser has."""
    names = [f".{name}" for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear)]
    if unknown := [target for target in targets if not any(name.endswith(f".{target}") for name in names)]:
        raise UserError(f"config.train.lora_targets: {type(denoiser).__name__} has no linear layer {unknown[0]!r}")


def load(denoiser, folder):
    """Attach the LoRA of a checkpoint folder, or put its numbers into the attached one; -> {name: parameter}, float32.

    Raises UserError for another model's.
    """
    stored = storage.read_tensors(pathlib.Path(folder) / "pytorch_lora_weights.safetensors", "run_train.py")
    try:
        if not _layers(denoiser):
            denoiser.load_lora_adapter(
                os.fspath(folder), prefix=_component(denoiser), adapter_name="default", use_safetensors=True
            )
            _trainable(denoiser)
        lora = parameters(denoiser)
        names = {f"{_component(denoiser)}.{name}": parameter for name, parameter in _as_stored(lora).items()}
        if foreign := names.keys() ^ stored.keys():  # diffusers passes over what it does not know
            raise ValueError(f"{min(foreign)} is in one of them only")
        # Once more, since diffusers rounds what it loads to the denoiser's precision.
        for name, parameter in names.items():
            parameter.data.copy_(stored[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no LoRA of this model: {str(error).splitlines()[0]}") from None
    return lora


def parameters(denoiser):
    """{name: parameter} of the attached LoRA."""
    return {name: parameter for name, parameter in denoiser.named_parameters() if ".lora_" in name}


def _as_stored(lora):
    """The same by the names of LoRA files, without the adapter's."""
    return {name.replace(".default.", "."): parameter for name, parameter in lora.items()}


def switch(denoiser, on):
    """Run the denoiser with its attached LoRA, trainable, or as the base model; without one there is nothing to do."""
    for layer in _layers(denoiser):
        layer.enable_adapters(on)


def _forward(layer, apart, x):
    """A LoRA layer's output: float32 on the CPU as x (W + B A)ᵀ, which is exact and takes fewer passes over x.

    In half precision, and under TF32, the sum would round the LoRA away, so elsewhere PEFT computes the two `apart`.
    """
    base = layer.get_base_layer()
    if layer.disable_adapters or base.weight.dtype != torch.float32 or x.device.type != "cpu":
        return apart(x)
    return torch.nn.functional.linear(x, base.weight + layer.get_delta_weight("default"), base.bias)


class Projection(torch.nn.Linear):
    """A LoRA matrix that is float32 and computes in its input's precision, as autocast would.

    PEFT would compute it in float32 and so turn every input and output of a half-precision base into float32 too.
    """

    def forward(self, x):
        """x (..., in) -> (..., out) in x's precision; the weight's gradient is float32."""
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


def _layers(denoiser):
    if not getattr(denoiser, "_hf_peft_config_loaded", False):
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in denoiser.modules() if isinstance(module, LoraLayer)]


def _trainable(denoiser):
    """{name: parameter} of the LoRA that was just attached, made float32 and trainable."""
    for layer in _layers(denoiser):
        layer.cast_input_dtype_enabled = False
        layer.forward = functools.partial(_forward, layer, layer.forward)
        for matrices in (layer.lora_A, layer.lora_B):
            for name, matrix in matrices.items():
                matrices[name] = Projection(matrix.in_features, matrix.out_features, bias=False, device="meta")
                matrices[name].weight = torch.nn.Parameter(matrix.weight.float())
    return parameters(denoiser)


def save(denoiser, folder, metadata=None):
    """Write pytorch_lora_weights.safetensors, as the stock pipeline's load_lora_weights(folder) reads it.

    metadata: {name: text} for the file's header, which loaders pass over; the denoiser's class is there too.
    """
    from diffusers.loaders.lora_pipeline import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin

    component = _component(denoiser)
    loader = StableDiffusionLoraLoaderMixin if component == "unet" else SD3LoraLoaderMixin
    loader.save_lora_weights(
        os.fspath(folder),
        **{f"{component}_lora_layers": _as_stored(parameters(denoiser))},
        save_function=lambda weights, path: storage.write_tensors(
            pathlib.Path(path), weights, {"format": "pt", "denoiser": _kind(denoiser), **(metadata or {})}
        ),
    )


def _component(denoiser):
    """What pipelines call the denoiser, and LoRA files put before its layers' names."""
    return "unet" if _kind(denoiser).startswith("UNet") else "transformer"


def _kind(denoiser):
    """Its class's name in diffusers, also where FSDP2 has put a class of its own over it."""
    return next(own.__name__ for own in type(denoiser).__mro__ if own.__module__.startswith("diffusers."))
