"""Stable Diffusion XL: a larger UNet, two text encoders, pooled embeddings and the picture's size as conditions."""

import torch

from .loading import model_index
from .sd import StableDiffusion, encode, load_text


class StableDiffusionXL(StableDiffusion):
    """The parts of a StableDiffusionXLPipeline; what is not said here is as in Stable Diffusion."""

    def _encoders(self):
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        kinds = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
        return [load_text(self.config, number, CLIPTokenizer, kind) for number, kind in kinds.items()]

    def _encode(self, encoders, prompt):
        """Both encoders' last but one hidden states beside each other, and the second one's pooled projection.

        The empty prompt is zeros where the pipeline says so, in its force_zeros_for_empty_prompt.
        """
        found = [encode(*encoder, prompt, output_hidden_states=True) for encoder in encoders]
        hidden = torch.cat([own.hidden_states[-2][0] for own in found], -1)
        own = {"encoder_hidden_states": hidden, "text_embeds": found[-1].text_embeds[0]}
        if not prompt and model_index(self.config).get("force_zeros_for_empty_prompt", True):
            own = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
        return own

    def embed(self, prompts):
        """The same, and time_ids: original height and width, crop's top and left, target height and width, pixels."""
        side = self.resolution
        ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
        return super().embed(prompts) | {"time_ids": ids.repeat(len(prompts), 1)}

    def text_shapes(self):
        """The shapes of one prompt's Conditioning, known before anything is loaded."""
        own = self.geometry.config
        pooled = own.projection_class_embeddings_input_dim - 6 * own.addition_time_embed_dim
        return super().text_shapes() | {"text_embeds": (pooled,), "time_ids": (6,)}

    def call(self, denoiser, latents, time, cond):
        """The UNet's output (B, C, H, W) in its precision, to which inputs are cast."""
        given = {name: tensor.to(denoiser.dtype) for name, tensor in cond.items()}
        hidden = given.pop("encoder_hidden_states")
        latents = latents.to(denoiser.dtype)
        return denoiser(latents, time, encoder_hidden_states=hidden, added_cond_kwargs=given).sample
