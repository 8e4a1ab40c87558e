"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder, DDIM."""

import functools

import torch

from ..ddim import DDIM
from ..errors import UserError
from ..guidance import guided
from ..run import processes
from ..run.processes import device
from ..run.prompts import read_prompts
from .loading import load, load_frozen, load_geometry, load_sharded

DECODED_LATENT_PIXELS = 8 * 64 * 64  # latent pixels that the VAE decodes at once: eight 512x512 pictures


class StableDiffusion:
    """The parts of a StableDiffusionPipeline, each loaded when it is first used, and all kept but the encoders."""

    untrained = 0  # last steps that have no density
    evaluations = 2  # of the denoiser for a prediction: guidance has two halves
    component = "unet"  # the denoiser's name in the pipeline
    fuses = True  # has cross-attention and self-attention apart, as D-Fusion needs them
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention

    def __init__(self, config):
        self.config, self._embeds = config, {}

    @staticmethod
    def denoiser_class():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return UNet2DConditionModel

    @functools.cached_property
    def denoiser(self):
        """The network that is trained, frozen, in the run's precision, on the run's device."""
        loading = load_sharded if self.config.sharded and processes.size() > 1 else load_frozen
        return loading(self.denoiser_class(), self.config, self.component)

    @functools.cached_property
    def geometry(self):
        """The denoiser without its numbers, on the meta device: what can be known before it is loaded."""
        return load_geometry(self.denoiser_class(), self.config, self.component)

    @property
    def trained_layers(self):
        """The ends of the names of the layers that get a LoRA."""
        return self.config.train.lora_targets or self.lora_targets

    @property
    def latent_shape(self):
        """(C, H, W). Raises UserError for a config.sample.resolution that the model does not allow."""
        own = self.geometry.config
        side = self._side(own.sample_size, 2 ** (len(own.block_out_channels) - 1))
        return own.in_channels, side, side

    @property
    def resolution(self):
        """Side of the pictures, in pixels."""
        return self.latent_shape[-1] * self._pixels

    @functools.cached_property
    def _pixels(self):
        """Pixels per latent pixel, along a side."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return 2 ** (len(load_geometry(AutoencoderKL, self.config, "vae").config.block_out_channels) - 1)

    def _side(self, default, multiple, most=None):
        """The latents' side for config.sample.resolution; it must be a multiple of `multiple`, `most` at most."""
        resolution = self.config.sample.resolution
        if not resolution:
            return default
        side, rest = divmod(resolution, self._pixels)
        if rest or side % multiple or (most and side > most):
            limit = f", at most {most * self._pixels}" if most else ""
            raise UserError(
                f"config.sample.resolution={resolution}: this model's pictures have sides of a multiple of "
                f"{multiple * self._pixels} pixels{limit}; 0 is its own"
            )
        return side

    @functools.cached_property
    def vae(self):
        """The AutoencoderKL, frozen; in bf16 under fp16, in which SD's decoder overflows for some latents."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        dtype = torch.bfloat16 if self.config.mixed_precision == "fp16" else None
        return load_frozen(AutoencoderKL, self.config, "vae", dtype)

    @functools.cached_property
    def _tokenizer(self):
        from transformers import CLIPTokenizer

        return load(CLIPTokenizer, self.config, "tokenizer")

    def token_spans(self, prompt):
        """The characters (first, last) of the prompt that each text token stands for; the same twice where for none."""
        given = self._tokenizer(prompt, padding="max_length", truncation=True, return_offsets_mapping=True)
        return [tuple(span) for span in given["offset_mapping"]]

    def _encoders(self):
        """[(tokenizer, encoder)], loaded."""
        from transformers import CLIPTextModel, CLIPTokenizer

        return [load_text(self.config, "", CLIPTokenizer, CLIPTextModel)]

    def _encode(self, encoders, prompt):
        """A prompt's Conditioning, without the batch's dimension."""
        ((tokenizer, encoder),) = encoders
        return {"encoder_hidden_states": encode(tokenizer, encoder, prompt).last_hidden_state[0]}

    @torch.no_grad()
    def embed(self, prompts):
        """Prompts -> their Conditioning (P, ...) on the CPU, in the run's precision.

        One by one and once each, so that a prompt's embedding does not depend on the others. All of the run's are
        embedded at once, and the encoders let go, so that they are never on a GPU together with the denoiser.
        """
        if any(prompt not in self._embeds for prompt in prompts):
            lists = (read_prompts(path) for path in (self.config.prompts.train, self.config.prompts.test))
            encoders = self._encoders()
            for prompt in dict.fromkeys(["", *prompts, *(prompt for own in lists for prompt in own)]):
                if prompt not in self._embeds:
                    own = self._encode(encoders, prompt)
                    self._embeds[prompt] = {name: tensor.cpu() for name, tensor in own.items()}
            del encoders
            if device().type == "cuda":
                torch.cuda.empty_cache()
        rows = [self._embeds[prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def text_shapes(self):
        """The shapes of one prompt's Conditioning, known before anything is loaded."""
        return {"encoder_hidden_states": (77, self.geometry.config.cross_attention_dim)}

    def call(self, denoiser, latents, time, cond):
        """The UNet's output (B, C, H, W) in its precision, to which inputs are cast."""
        given = {name: tensor.to(denoiser.dtype) for name, tensor in cond.items()}
        return denoiser(latents.to(denoiser.dtype), time, **given).sample

    def predict(self, denoiser, latents, time, cond, negative, guidance):
        """The guided output, float32 (B, C, H, W)."""
        return guided(functools.partial(self.call, denoiser), latents, time, cond, negative, guidance)

    def attentions(self, denoiser):
        """(self-attentions that D-Fusion fuses, cross-attentions that say where the words are), modules of the UNet.

        Fused is from the middle on up; looked at is the way down, which a call passes first, where its side is nearest
        to a quarter of the latents', SD's 16 of 64.
        """
        named = [
            (name.split("."), layer) for name, layer in denoiser.named_modules() if name[-6:] in (".attn1", ".attn2")
        ]
        fused = [layer for path, layer in named if path[0] in ("mid_block", "up_blocks") and path[-1] == "attn1"]
        down = [(int(path[1]), layer) for path, layer in named if path[0] == "down_blocks" and path[-1] == "attn2"]
        nearest = min((block for block, _ in down), key=lambda block: abs(block - 2))
        return fused, [layer for block, layer in down if block == nearest]

    def attention_map(self, attention, rows, hidden_states, encoder_hidden_states, **unused):
        """softmax(Q Kᵀ/√d) of some rows of a cross-attention's input, averaged over its heads: (B, n, L) float32."""
        query, key = (
            project(given[rows]).unflatten(-1, (attention.heads, -1)).transpose(1, 2).float()
            for project, given in ((attention.to_q, hidden_states), (attention.to_k, encoder_hidden_states))
        )
        return (query @ key.transpose(-1, -2) * attention.scale).softmax(-1).mean(1)

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


def load_text(config, number, tokenizer, encoder):
    """(tokenizer, encoder) of a pipeline, loaded by the two classes; number: "", "_2" or "_3"."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return load(tokenizer, config, f"tokenizer{number}"), load_frozen(encoder, config, f"text_encoder{number}")


def encode(tokenizer, encoder, prompt, max_length=None, **options):
    """What an encoder says of a prompt, filled up to max_length tokens, the tokenizer's own unless given."""
    ids = tokenizer([prompt], padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return encoder(ids.input_ids.to(encoder.device), **options)
