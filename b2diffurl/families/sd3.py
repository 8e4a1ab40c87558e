"""Stable Diffusion 3 and 3.5: a transformer that predicts velocities, two CLIP encoders and, where it is there, T5."""

import torch

from ..errors import UserError
from ..flow import Flow
from ..run.processes import device
from .loading import load, model_index
from .sd import StableDiffusion, encode, load_text


class StableDiffusion3(StableDiffusion):
    """The parts of a StableDiffusion3Pipeline; what is not said here is as in Stable Diffusion."""

    untrained = 1  # last steps that have no density
    component = "transformer"
    fuses = False
    most_shift = 1.16  # of a scheduler that shifts by the picture's size and does not say it
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

    @staticmethod
    def denoiser_class():
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    @property
    def latent_shape(self):
        """(C, H, W). Raises UserError for a config.sample.resolution that the model does not allow."""
        own = self.geometry.config
        side = self._side(own.sample_size, own.patch_size, own.pos_embed_max_size * own.patch_size)
        return own.in_channels, side, side

    @property
    def tokens(self):
        """How many tokens a picture is to the transformer."""
        return (self.latent_shape[-1] // self.geometry.config.patch_size) ** 2

    def _encoders(self):
        """Those of the two CLIPs, and of T5 or None."""
        from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

        clips = [load_text(self.config, i, CLIPTokenizer, CLIPTextModelWithProjection) for i in ("", "_2")]
        t5 = model_index(self.config).get("text_encoder_3", [None])[0]
        return [*clips, load_text(self.config, "_3", AutoTokenizer, T5EncoderModel) if t5 else None]

    def _encode(self, encoders, prompt):
        """The CLIPs' last but one hidden states beside each other, and after them T5's; the CLIPs' pooled projections.

        The former are filled up with zeros to T5's width, and T5's are zeros where it is left out.
        """
        *clips, t5 = encoders
        width, count = self.geometry.config.joint_attention_dim, self.config.pretrained.max_sequence_length
        found = [encode(*clip, prompt, output_hidden_states=True) for clip in clips]
        hidden = torch.cat([own.hidden_states[-2][0] for own in found], -1)
        hidden = torch.nn.functional.pad(hidden, (0, width - hidden.shape[-1]))
        last = encode(*t5, prompt, max_length=count).last_hidden_state[0] if t5 else hidden.new_zeros(count, width)
        pooled = torch.cat([own.text_embeds[0] for own in found], -1)
        return {"encoder_hidden_states": torch.cat([hidden, last]), "pooled_projections": pooled}

    def text_shapes(self):
        """The shapes of one prompt's Conditioning, known before anything is loaded."""
        own, tokens = self.geometry.config, 77 + self.config.pretrained.max_sequence_length
        return {
            "encoder_hidden_states": (tokens, own.joint_attention_dim),
            "pooled_projections": (own.pooled_projection_dim,),
        }

    def call(self, denoiser, latents, time, cond):
        """The transformer's output (B, C, H, W) in its precision, to which inputs are cast."""
        given = {name: tensor.to(denoiser.dtype) for name, tensor in cond.items()}
        return denoiser(latents.to(denoiser.dtype), timestep=time, **given).sample

    def kernel(self, steps, sample):
        """The flow's kernel with the pipeline's own σ's over so many steps, on the run's device; sample: config.sample.

        A scheduler with use_dynamic_shifting gets the shift of the picture's tokens, as the pipeline gives it.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = load(FlowMatchEulerDiscreteScheduler, self.config, "scheduler")
        given = self._sigmas(steps)
        if scheduler.config.use_dynamic_shifting:
            given["mu"] = shift(self.tokens, scheduler.config, self.most_shift)
        scheduler.set_timesteps(**given, device=device())
        scheduler.sigmas = scheduler.sigmas.to(device())
        return Flow(scheduler, sample.noise_level, sample.sampler)

    def _sigmas(self, steps):
        """What the pipeline asks its scheduler for: so many σ's of its own."""
        return {"num_inference_steps": steps}

    @torch.no_grad()
    def decode(self, latents):
        """Latents (B, C, h, w) -> pictures (B, H, W, 3) uint8 on their device, one at a time."""
        config, pictures = self.vae.config, []
        for one in latents.split(1):
            scaled = one.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0)
            pictures.append(self.vae.decode(scaled).sample.float())
        return ((torch.cat(pictures) / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def shift(tokens, scheduler, most):
    """mu for a picture of so many tokens, linear in them; most: the scheduler's max_shift where it says none."""
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", most)
    return least + (most - least) * (tokens - low) / (high - low)
