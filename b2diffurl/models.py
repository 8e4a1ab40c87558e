"""The parts of a Stable Diffusion pipeline and the reward: each loaded when it is first used, and then kept."""

import contextlib
import ctypes
import functools
import pathlib
import platform

import torch

from .errors import UserError
from .families import lora
from .rollout import Sampler
from .run.processes import device

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMMITS = {  # a commit that is in the cache is loaded without a request, and cannot change during a run
    "CompVis/stable-diffusion-v1-4": "133a221b8aa7292a167afc5127cb63fb5005638b",
}
DECODED_LATENT_PIXELS = 8 * 64 * 64  # latent pixels that the VAE decodes at once: eight 512x512 pictures of SD
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's numbers, from malloc.h


class Models:
    """What the steps of a run compute with; run_process.sh keeps one for the whole run, a script one for its step."""

    def __init__(self, config):
        prepare(config)
        self.config, self._embeds = config, {}

    @functools.cached_property
    def unet(self):
        """The UNet2DConditionModel, frozen, in the run's precision, on the run's device."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return _load_frozen(UNet2DConditionModel, self.config, "unet")

    @functools.cached_property
    def vae(self):
        """The AutoencoderKL, frozen; in bf16 under fp16, in which SD's decoder overflows for some latents."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        dtype = torch.bfloat16 if self.config.mixed_precision == "fp16" else None
        return _load_frozen(AutoencoderKL, self.config, "vae", dtype)

    @functools.cached_property
    def scheduler(self):
        """The run's DDIMScheduler: see load_scheduler."""
        return load_scheduler(self.config)

    @functools.cached_property
    def _text(self):
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return _load(CLIPTokenizer, self.config, "tokenizer"), _load_frozen(CLIPTextModel, self.config, "text_encoder")

    @functools.cached_property
    def _reward(self):
        from .rewards import load_reward

        return load_reward(self.config, device())

    @torch.no_grad()
    def embed(self, prompts):
        """Prompts -> their text embeddings (P, L, D) on the CPU, in the run's precision.

        One by one and once each, so that a prompt's embedding does not depend on the others.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeds:
                tokenizer, encoder = self._text
                ids = tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
                self._embeds[prompt] = encoder(ids.to(encoder.device)).last_hidden_state[0].cpu()
        return torch.stack([self._embeds[prompt] for prompt in prompts])

    def sampler(self, checkpoint=None):
        """The denoising policy: the UNet, with a checkpoint folder's LoRA where one is given, run as config says."""
        unet, sample = self.unet, self.config.sample
        if checkpoint:
            lora.load(unet, checkpoint)
        lora.switch(unet, bool(checkpoint))
        negative = self.embed([""]).to(device())
        return Sampler(unet, self.scheduler, negative, sample.guidance_scale, sample.eta, sample.batch_size)

    def trainable(self, checkpoint=None):
        """The UNet with a checkpoint folder's LoRA or a fresh one, and {name: parameter} of it, float32."""
        unet = self.unet
        parameters = lora.load(unet, checkpoint) if checkpoint else lora.add(unet, self.config)
        lora.switch(unet, True)
        if self.config.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet, parameters

    @contextlib.contextmanager
    def scoring(self):
        """The Reward, on the run's device; between two uses a GPU's reward models wait in the machine's memory."""
        self._reward.move(device())
        yield self._reward
        if device().type == "cuda":
            self._reward.move("cpu")
            torch.cuda.empty_cache()


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


def revision(config):
    """The revision of a hub id: config.pretrained.revision, or where that is "" the known commit, or "main"."""
    return config.pretrained.revision or COMMITS.get(config.pretrained.model, "main")


def _load(loader, config, subfolder, **options):
    from safetensors import SafetensorError

    model = config.pretrained.model
    where = {} if pathlib.Path(model).is_dir() else {"revision": revision(config)}
    try:
        return loader.from_pretrained(model, subfolder=subfolder, **where, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"config.pretrained.model={model!r}: its {subfolder} does not load: {reason}") from None


def _load_frozen(loader, config, subfolder, dtype=None):
    model = _load(loader, config, subfolder, torch_dtype=dtype or DTYPES[config.mixed_precision])
    # channels_last is the layout that the fast convolutions of CPU and GPU want; it moves no number
    return model.to(device(), memory_format=torch.channels_last).requires_grad_(False).eval()


def load_scheduler(config):
    """A DDIMScheduler with the pipeline's betas, its timesteps set to config.sample.num_steps, on the run's device.

    Raises UserError where some step would have no variance, and so no log-probability.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    # As StableDiffusionPipeline sets them: configurations of other schedulers lack them, and DDIM's defaults clip.
    scheduler = _load(DDIMScheduler, config, "scheduler", steps_offset=1, clip_sample=False)
    trained, steps = scheduler.config.num_train_timesteps, config.sample.num_steps
    if steps > trained:
        raise UserError(f"config.sample.num_steps={steps}: the model has {trained} timesteps; take at most that many")
    scheduler.set_timesteps(steps)
    first, last = scheduler.timesteps[[0, -1]].tolist()
    if scheduler.config.thresholding or last < 1 or scheduler.alphas_cumprod[first] <= 0:
        raise UserError(
            f"config.pretrained.model={config.pretrained.model!r}: its scheduler has steps without a density; set "
            'thresholding=false, rescale_betas_zero_snr=false and timestep_spacing="leading" in scheduler_config.json'
        )
    for name in ("alphas_cumprod", "timesteps"):  # where they are used, so that no step waits for a copy
        setattr(scheduler, name, getattr(scheduler, name).to(device()))
    return scheduler


@torch.no_grad()
def decode(vae, latents):
    """Latents (B, C, h, w) -> pictures (B, H, W, 3) uint8 on the latents' device; large pictures a few at a time."""
    at_once = max(1, DECODED_LATENT_PIXELS // latents[0, 0].numel())
    pictures = [
        ((vae.decode(part.to(vae.dtype) / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1) * 255)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        for part in latents.split(at_once)
    ]
    return torch.cat(pictures)
