"""Stable Diffusion 3 and 3.5: a transformer that predicts velocities, two CLIP encoders and, where it is there, T5."""

import functools

import torch

from ..errors import UserError
from ..flow import Flow
from ..run.processes import device
from .loading import load, load_frozen, model_index
from .sd import StableDiffusion

T5_TOKENS = 256  # of a prompt, as the pipeline has them


class StableDiffusion3(StableDiffusion):
    """The parts of a StableDiffusion3Pipeline; what is not said here is as in Stable Diffusion."""

    untrained = 1  # last steps that have no density
    lora_targets = (  # of every attention, that of 3.5's dual blocks too
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip

    def __init__(self, config):
        super().__init__(config)
        if config.schedule.untrained < self.untrained:
            raise UserError(
                f"config.schedule.untrained={config.schedule.untrained}: the last step of a flow model has no density; "
                f"set it to {self.untrained}"
            )

    @functools.cached_property
    def denoiser(self):
        """The SD3Transformer2DModel, frozen, in the run's precision, on the run's device."""
        from diffusers import SD3Transformer2DModel

        return load_frozen(SD3Transformer2DModel, self.config, "transformer")

    @functools.cached_property
    def _text(self):
        """[(tokenizer, encoder)] of the two CLIPs, and of T5 or None."""
        from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        found = [
            (load(CLIPTokenizer, self.config, f"tokenizer{i}"),
             load_frozen(CLIPTextModelWithProjection, self.config, f"text_encoder{i}"))
            for i in ("", "_2")
        ]  # fmt: skip
        if model_index(self.config).get("text_encoder_3", [None])[0] is None:
            return [*found, None]
        tokenizer = load(AutoTokenizer, self.config, "tokenizer_3")
        return [*found, (tokenizer, load_frozen(T5EncoderModel, self.config, "text_encoder_3"))]

    @torch.no_grad()
    def embed(self, prompts):
        """Prompts -> their Conditioning (P, ...) on the CPU, one by one and once each.

        The CLIPs' last but one hidden states beside each other, filled up with zeros to T5's width, and after them
        T5's, or zeros where it is left out; the CLIPs' pooled projections beside each other.
        """
        width = self.denoiser.config.joint_attention_dim
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeds:
                *clips, t5 = self._text
                found = [self._encode(*clip, prompt, output_hidden_states=True) for clip in clips]
                hidden = torch.cat([own.hidden_states[-2][0] for own in found], -1)
                hidden = torch.nn.functional.pad(hidden, (0, width - hidden.shape[-1]))
                if t5:
                    last = self._encode(*t5, prompt, max_length=T5_TOKENS).last_hidden_state[0]
                else:
                    last = hidden.new_zeros(T5_TOKENS, width)
                pooled = torch.cat([own.text_embeds[0] for own in found], -1)
                self._embeds[prompt] = torch.cat([hidden, last]).cpu(), pooled.cpu()
        hidden, pooled = map(torch.stack, zip(*(self._embeds[prompt] for prompt in prompts), strict=True))
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def _encode(self, tokenizer, encoder, prompt, max_length=None, **options):
        ids = tokenizer([prompt], padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
        return encoder(ids.input_ids.to(encoder.device), **options)

    def call(self, denoiser, latents, time, cond):
        """The transformer's output (B, C, H, W) in its precision, to which inputs are cast."""
        given = {name: tensor.to(denoiser.dtype) for name, tensor in cond.items()}
        return denoiser(latents.to(denoiser.dtype), timestep=time, **given).sample

    def kernel(self, steps, sample):
        """The flow's kernel with the pipeline's own σ's over so many steps, on the run's device; sample: config.sample.

        Raises UserError for a scheduler whose shift depends on the picture's size.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = load(FlowMatchEulerDiscreteScheduler, self.config, "scheduler")
        if scheduler.config.use_dynamic_shifting:
            raise UserError(
                f"config.pretrained.model={self.config.pretrained.model!r}: its scheduler has use_dynamic_shifting; "
                "set it to false, and shift, in scheduler_config.json"
            )
        scheduler.set_timesteps(steps, device=device())
        scheduler.sigmas = scheduler.sigmas.to(device())
        return Flow(scheduler, sample.noise_level, sample.sampler)

    @torch.no_grad()
    def decode(self, latents):
        """Latents (B, C, h, w) -> pictures (B, H, W, 3) uint8 on their device, one at a time."""
        config, pictures = self.vae.config, []
        for one in latents.split(1):
            scaled = one.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0)
            pictures.append(self.vae.decode(scaled).sample.float())
        return ((torch.cat(pictures) / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
