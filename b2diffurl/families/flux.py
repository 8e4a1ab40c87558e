"""FLUX.1-dev: a transformer of packed latents with guidance as an input, CLIP's pooled output and T5."""

import numpy as np
import torch

from ..errors import UserError
from .sd import encode, load_text
from .sd3 import StableDiffusion3

SIDE = 128  # of the latents, where config.sample.resolution is 0: the pipeline's default, 1024 pixels


class Flux(StableDiffusion3):
    """The parts of a FluxPipeline; what is not said here is as in Stable Diffusion 3."""

    evaluations = 1  # guidance was distilled into the model: there is no second half
    most_shift = 1.15
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
        "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    def __init__(self, config):
        super().__init__(config)
        if not self.geometry.config.guidance_embeds:
            raise UserError(
                f"config.pretrained.model={config.pretrained.model!r} was distilled for few steps (it takes no "
                "guidance), and learns nothing from many: take FLUX.1-dev"
            )

    @staticmethod
    def denoiser_class():
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel

    @property
    def latent_shape(self):
        """(C, H, W) before packing. Raises UserError for a config.sample.resolution that the model does not allow."""
        side = self._side(SIDE, 2)
        return self.geometry.config.in_channels // 4, side, side

    @property
    def tokens(self):
        """How many tokens a picture is to the transformer."""
        return (self.latent_shape[-1] // 2) ** 2

    def _encoders(self):
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel

        clip = load_text(self.config, "", CLIPTokenizer, CLIPTextModel)
        return [clip, load_text(self.config, "_2", AutoTokenizer, T5EncoderModel)]

    def _encode(self, encoders, prompt):
        """T5's last hidden states, and CLIP's pooled output."""
        clip, t5 = encoders
        hidden = encode(*t5, prompt, max_length=self.config.pretrained.max_sequence_length).last_hidden_state[0]
        return {"encoder_hidden_states": hidden, "pooled_projections": encode(*clip, prompt).pooler_output[0]}

    def text_shapes(self):
        """The shapes of one prompt's Conditioning, known before anything is loaded."""
        own = self.geometry.config
        return {
            "encoder_hidden_states": (self.config.pretrained.max_sequence_length, own.joint_attention_dim),
            "pooled_projections": (own.pooled_projection_dim,),
        }

    def call(self, denoiser, latents, time, cond, guidance=1.0):
        """The transformer's output (B, C, H, W) in its precision, to which inputs are cast."""
        given = {name: tensor.to(denoiser.dtype) for name, tensor in cond.items()}
        side, hidden = latents.shape[-1], given["encoder_hidden_states"]
        output = denoiser(
            pack(latents.to(denoiser.dtype)),
            timestep=time / 1000,
            guidance=time.new_full(time.shape, guidance, dtype=torch.float32),
            txt_ids=hidden.new_zeros(hidden.shape[1], 3),
            img_ids=positions(side // 2, latents.device),
            **given,
        )
        return unpack(output.sample, side)

    def predict(self, denoiser, latents, time, cond, negative, guidance):
        """The guided output, float32 (B, C, H, W): guidance is an input, the negative prompt is not used."""
        return self.call(denoiser, latents, time, cond, guidance).float()

    def _sigmas(self, steps):
        """What the pipeline asks its scheduler for: σ's in even steps from 1 to 1/T, which it shifts."""
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}


def pack(latents):
    """(B, C, H, W) -> (B, H/2 · W/2, 4 C): a token for every 2x2 patch."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens, side):
    """The way back, to (B, C, side, side)."""
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side // 2, -1)), 2)


def positions(side, device):
    """(side², 3): the tokens' places, (0, row, column)."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).to(device, torch.float32)
