"""Loading the parts of a Stable Diffusion pipeline one by one: each step loads only what it uses."""

import os
import pathlib

import torch

from .configuration import UserError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention of the UNet


def device():
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(loader, config, subfolder, **options):
    model = config.pretrained.model
    where = {} if pathlib.Path(model).is_dir() else {"revision": config.pretrained.revision}
    try:
        return loader.from_pretrained(model, subfolder=subfolder, **where, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"config.pretrained.model={model!r}: its {subfolder} does not load: {reason}") from None


def _load_frozen(loader, config, subfolder, dtype=None):
    model = _load(loader, config, subfolder, torch_dtype=dtype or DTYPES[config.mixed_precision])
    return model.to(device()).requires_grad_(False).eval()


def load_unet(config):
    """The UNet2DConditionModel, frozen, in the run's precision, on the run's device."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return _load_frozen(UNet2DConditionModel, config, "unet")


def load_vae(config):
    """The AutoencoderKL, frozen; in float32 or bf16, since SD's decoder overflows in fp16 for some latents."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    dtype = torch.float32 if config.mixed_precision == "fp16" else None
    return _load_frozen(AutoencoderKL, config, "vae", dtype)


def load_scheduler(config):
    """A DDIMScheduler with the pipeline's betas, its timesteps set to config.sample.num_steps."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = _load(DDIMScheduler, config, "scheduler")
    if scheduler.config.thresholding:
        raise UserError(f"config.pretrained.model={config.pretrained.model!r}: its scheduler has thresholding on")
    scheduler.set_timesteps(config.sample.num_steps)
    return scheduler


@torch.no_grad()
def embed_prompts(config, prompts):
    """Distinct prompts -> their text embeddings (P, L, D) on the CPU, in the run's precision."""
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = _load(CLIPTokenizer, config, "tokenizer")
    encoder = _load_frozen(CLIPTextModel, config, "text_encoder")
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([encoder(chunk.to(encoder.device)).last_hidden_state.cpu() for chunk in ids.split(64)])


@torch.no_grad()
def decode(vae, latents):
    """Latents (B, C, h, w) -> pictures (B, H, W, 3) uint8 on the CPU."""
    pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return ((pictures.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()


def add_lora(unet, config):
    """Attach a fresh LoRA: down-projection N(0, 1/rank²), up-projection zero, scale 1; trainable and float32."""
    from peft import LoraConfig

    torch.manual_seed(config.seed)
    rank = config.train.lora_rank
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    return _trainable(unet)


def load_lora(unet, folder):
    """Attach the LoRA of a checkpoint folder; trainable and float32."""
    unet.load_lora_adapter(os.fspath(folder), prefix="unet", adapter_name="default", use_safetensors=True)
    return _trainable(unet)


def _trainable(unet):
    parameters = {name: p for name, p in unet.named_parameters() if ".lora_" in name}
    for p in parameters.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    return parameters


def save_lora(unet, folder):
    """Write pytorch_lora_weights.safetensors, as StableDiffusionPipeline.load_lora_weights(folder) reads it."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from peft.utils import get_peft_model_state_dict

    StableDiffusionLoraLoaderMixin.save_lora_weights(os.fspath(folder), get_peft_model_state_dict(unet))
