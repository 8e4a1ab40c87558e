"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder, DDIM."""

import functools

import torch

from ..ddim import DDIM
from ..errors import UserError
from ..guidance import guided
from ..run.processes import device
from .loading import load, load_frozen

DECODED_LATENT_PIXELS = 8 * 64 * 64  # latent pixels that the VAE decodes at once: eight 512x512 pictures


class StableDiffusion:
    """The parts of a StableDiffusionPipeline, each loaded when it is first used, and then kept."""

    untrained = 0  # last steps that have no density
    evaluations = 2  # of the denoiser for a prediction: guidance has two halves
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention

    def __init__(self, config):
        self.config, self._embeds = config, {}

    @functools.cached_property
    def denoiser(self):
        """The UNet2DConditionModel, frozen, in the run's precision, on the run's device."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return load_frozen(UNet2DConditionModel, self.config, "unet")

    @property
    def latent_shape(self):
        """(C, H, W)."""
        config = self.denoiser.config
        return config.in_channels, config.sample_size, config.sample_size

    @functools.cached_property
    def vae(self):
        """The AutoencoderKL, frozen; in bf16 under fp16, in which SD's decoder overflows for some latents."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        dtype = torch.bfloat16 if self.config.mixed_precision == "fp16" else None
        return load_frozen(AutoencoderKL, self.config, "vae", dtype)

    @functools.cached_property
    def _text(self):
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return load(CLIPTokenizer, self.config, "tokenizer"), load_frozen(CLIPTextModel, self.config, "text_encoder")

    @torch.no_grad()
    def embed(self, prompts):
        """Prompts -> their Conditioning (P, ...) on the CPU, in the run's precision.

        One by one and once each, so that a prompt's embedding does not depend on the others.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeds:
                tokenizer, encoder = self._text
                ids = tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
                self._embeds[prompt] = encoder(ids.to(encoder.device)).last_hidden_state[0].cpu()
        return {"encoder_hidden_states": torch.stack([self._embeds[prompt] for prompt in prompts])}

    def call(self, denoiser, latents, time, cond):
        """The UNet's output (B, C, H, W) in its precision, to which inputs are cast."""
        given = {name: tensor.to(denoiser.dtype) for name, tensor in cond.items()}
        return denoiser(latents.to(denoiser.dtype), time, **given).sample

    def predict(self, denoiser, latents, time, cond, negative, guidance):
        """The guided output, float32 (B, C, H, W)."""
        return guided(functools.partial(self.call, denoiser), latents, time, cond, negative, guidance)

    def kernel(self, steps, sample):
        """The DDIM kernel with the pipeline's betas over so many steps, on the run's device; sample: config.sample.

        Raises UserError where some step would have no variance, and so no log-probability.
        """
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        # As StableDiffusionPipeline sets them: configurations of other schedulers lack them, and DDIM's defaults clip.
        scheduler = load(DDIMScheduler, self.config, "scheduler", steps_offset=1, clip_sample=False)
        trained, model = scheduler.config.num_train_timesteps, self.config.pretrained.model
        if steps > trained:
            raise UserError(
                f"config.sample.num_steps={steps}: the model has {trained} timesteps; take at most that many"
            )
        scheduler.set_timesteps(steps)
        first, last = scheduler.timesteps[[0, -1]].tolist()
        if scheduler.config.thresholding or last < 1 or scheduler.alphas_cumprod[first] <= 0:
            raise UserError(
                f"config.pretrained.model={model!r}: its scheduler has steps without a density; set thresholding="
                'false, rescale_betas_zero_snr=false and timestep_spacing="leading" in scheduler_config.json'
            )
        for name in ("alphas_cumprod", "timesteps"):  # where they are used, so that no step waits for a copy
            setattr(scheduler, name, getattr(scheduler, name).to(device()))
        return DDIM(scheduler, sample.eta)

    @torch.no_grad()
    def decode(self, latents):
        """Latents (B, C, h, w) -> pictures (B, H, W, 3) uint8 on their device; large pictures a few at a time."""
        at_once, vae = max(1, DECODED_LATENT_PIXELS // latents[0, 0].numel()), self.vae
        pictures = [
            ((vae.decode(few.to(vae.dtype) / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1) * 255)
            .round()
            .byte()
            .permute(0, 2, 3, 1)
            for few in latents.split(at_once)
        ]
        return torch.cat(pictures)
