"""Stable Diffusion XL: a larger UNet, two text encoders, pooled embeddings and the picture's size as conditions."""

import functools

import torch

from .loading import load, load_frozen, model_index
from .sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """The parts of a StableDiffusionXLPipeline; what is not said here is as in Stable Diffusion."""

    @functools.cached_property
    def _text(self):
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        encoders = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
        return [
            (load(CLIPTokenizer, self.config, f"tokenizer{i}"), load_frozen(kind, self.config, f"text_encoder{i}"))
            for i, kind in encoders.items()
        ]

    @functools.cached_property
    def time_ids(self):
        """(1, 6): original height and width, crop's top and left, target height and width, in pixels."""
        side = self.denoiser.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)

    @torch.no_grad()
    def embed(self, prompts):
        """Prompts -> their Conditioning (P, ...) on the CPU.

        Both encoders' last but one hidden states beside each other, the second one's pooled projection, and the
        picture's size. One by one and once each. The empty prompt is zeros where the pipeline says so, in its
        force_zeros_for_empty_prompt.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeds:
                hidden = []
                for tokenizer, encoder in self._text:
                    ids = tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
                    found = encoder(ids.to(encoder.device), output_hidden_states=True)
                    hidden.append(found.hidden_states[-2][0])
                own = torch.cat(hidden, -1).cpu(), found.text_embeds[0].cpu()
                if not prompt and model_index(self.config).get("force_zeros_for_empty_prompt", True):
                    own = tuple(torch.zeros_like(tensor) for tensor in own)
                self._embeds[prompt] = own
        hidden, pooled = map(torch.stack, zip(*(self._embeds[prompt] for prompt in prompts), strict=True))
        sizes = self.time_ids.repeat(len(prompts), 1)
        return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": sizes}

    def call(self, denoiser, latents, time, cond):
        """The UNet's output (B, C, H, W) in its precision, to which inputs are cast."""
        given = {name: tensor.to(denoiser.dtype) for name, tensor in cond.items()}
        hidden = given.pop("encoder_hidden_states")
        latents = latents.to(denoiser.dtype)
        return denoiser(latents, time, encoder_hidden_states=hidden, added_cond_kwargs=given).sample
