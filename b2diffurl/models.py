"""Loading the parts of a Stable Diffusion pipeline one by one: each step loads only what it uses."""

import ctypes
import os
import pathlib
import platform

import torch

from . import files
from .branch_sampling import FEWEST, Sampler
from .configuration import UserError
from .distributed import device

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DECODED_LATENT_PIXELS = 4 * 64 * 64  # latent pixels that the VAE decodes at once: four 512x512 pictures of SD
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's numbers, from malloc.h
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention of the UNet


def prepare(config):
    """How this process computes: float32 in TF32 on a GPU where config.allow_tf32 says so, kept memory on the CPU.

    glibc hands a large freed block back to the system, and every page of the next one costs a fault and a zeroing:
    a fifth of the time of sampling. mallopt makes it keep the blocks.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if platform.libc_ver()[0] == "glibc" and not torch.cuda.is_available():
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # older glibc's most
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _load(loader, config, subfolder, **options):
    from safetensors import SafetensorError

    model = config.pretrained.model
    where = {} if pathlib.Path(model).is_dir() else {"revision": config.pretrained.revision}
    try:
        return loader.from_pretrained(model, subfolder=subfolder, **where, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"config.pretrained.model={model!r}: its {subfolder} does not load: {reason}") from None


def _load_frozen(loader, config, subfolder, dtype=None):
    model = _load(loader, config, subfolder, torch_dtype=dtype or DTYPES[config.mixed_precision])
    # channels_last is the layout that the fast convolutions of CPU and GPU want; it moves no number
    return model.to(device(), memory_format=torch.channels_last).requires_grad_(False).eval()


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
    """A DDIMScheduler with the pipeline's betas, its timesteps set to config.sample.num_steps.

    Raises UserError where some step would have no variance, and so no log-probability.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    # As StableDiffusionPipeline sets them: configurations of other schedulers lack them, and DDIM's defaults clip.
    scheduler = _load(DDIMScheduler, config, "scheduler", steps_offset=1, clip_sample=False)
    trained, steps = scheduler.config.num_train_timesteps, config.sample.num_steps
    if steps > trained:
        raise UserError(f"config.sample.num_steps={steps}: the model has {trained} timesteps; take at most that many")
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device())
    first, last = scheduler.timesteps[[0, -1]].tolist()
    if scheduler.config.thresholding or last < 1 or scheduler.alphas_cumprod[first] <= 0:
        raise UserError(
            f"config.pretrained.model={config.pretrained.model!r}: its scheduler has steps without a density; set "
            'thresholding=false, rescale_betas_zero_snr=false and timestep_spacing="leading" in scheduler_config.json'
        )
    return scheduler


def load_sampler(config, negative_embeds, checkpoint=None):
    """The denoising policy: the UNet, with a checkpoint folder's LoRA where one is given, and how config runs it.

    On the CPU in float32 the LoRA is added into the weights, which saves its passes over the activations. In half
    precision, and under TF32, that would round it away, and another policy would sample than the one that is trained.
    """
    unet = load_unet(config)
    if checkpoint:
        load_lora(unet, checkpoint)
        if unet.dtype == torch.float32 and unet.device.type == "cpu":
            unet.fuse_lora()
    sample = config.sample
    negative = negative_embeds.to(device())
    return Sampler(unet, load_scheduler(config), negative, sample.guidance_scale, sample.eta, sample.batch_size)


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
    """Latents (B, C, h, w) -> pictures (B, H, W, 3) uint8 on the CPU; large pictures a few at a time."""
    if latents.device.type == "cpu" and len(latents) < FEWEST:
        return decode(vae, latents[torch.arange(FEWEST).clamp(max=len(latents) - 1)])[: len(latents)]
    at_once = max(1, DECODED_LATENT_PIXELS // latents[0, 0].numel())
    pictures = [
        ((vae.decode(part.to(vae.dtype) / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1) * 255)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .cpu()
        for part in latents.split(at_once)
    ]
    return torch.cat(pictures)


def add_lora(unet, config):
    """Attach a fresh LoRA: down-projection N(0, 1/rank²), up-projection zero, scale 1; trainable and float32."""
    from peft import LoraConfig

    torch.manual_seed(config.seed)
    rank = config.train.lora_rank
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    return _trainable(unet)


def load_lora(unet, folder):
    """Attach the LoRA of a checkpoint folder; trainable and float32. Raises UserError for another model's."""
    stored = files.read_tensors(pathlib.Path(folder) / "pytorch_lora_weights.safetensors", "run_train.py")
    try:
        unet.load_lora_adapter(os.fspath(folder), prefix="unet", adapter_name="default", use_safetensors=True)
        lora = _trainable(unet)
        names = {f"unet.{name.replace('.default.', '.')}": parameter for name, parameter in lora.items()}
        if foreign := names.keys() ^ stored.keys():  # diffusers passes over what it does not know
            raise ValueError(f"{min(foreign)} is in one of them only")
        for name, parameter in names.items():  # once more, since diffusers rounds what it loads to the UNet's precision
            parameter.data.copy_(stored[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no LoRA of this model: {str(error).splitlines()[0]}") from None
    return lora


class LoraProjection(torch.nn.Linear):
    """A LoRA matrix that is float32 and computes in its input's precision, as autocast would.

    PEFT would compute it in float32 and so turn every input and output of a half-precision base into float32 too.
    """

    def forward(self, x):
        """x (..., in) -> (..., out) in x's precision; the weight's gradient is float32."""
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


def _trainable(unet):
    """{name: parameter} of the LoRA, made float32 and trainable."""
    from peft.tuners.lora import LoraLayer

    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for matrices in (layer.lora_A, layer.lora_B):
                for name, matrix in matrices.items():
                    matrices[name] = LoraProjection(matrix.in_features, matrix.out_features, bias=False, device="meta")
                    matrices[name].weight = torch.nn.Parameter(matrix.weight.float())
    return {name: p for name, p in unet.named_parameters() if ".lora_" in name}


def save_lora(unet, folder, metadata=None):
    """Write pytorch_lora_weights.safetensors, as StableDiffusionPipeline.load_lora_weights(folder) reads it.

    metadata: {name: text} for the file's header, which loaders pass over.
    """
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from peft.utils import get_peft_model_state_dict

    StableDiffusionLoraLoaderMixin.save_lora_weights(
        os.fspath(folder),
        get_peft_model_state_dict(unet),
        save_function=lambda weights, path: files.write_tensors(
            pathlib.Path(path), weights, {"format": "pt", **(metadata or {})}
        ),
    )
