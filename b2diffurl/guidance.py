"""Classifier-free guidance, one function for sampling and training: what is trained is exactly what sampled."""

import torch


def guided_noise(unet, latents, timesteps, embeds, negative_embeds, scale):
    """e_uncond + scale (e_cond - e_uncond), float32 (B, C, H, W), both halves in one UNet call.

    latents (B, C, H, W), timesteps (B,), embeds and negative_embeds (B, L, D); inputs are cast to the UNet's dtype.
    """
    dtype = unet.dtype
    both = unet(
        torch.cat([latents, latents]).to(dtype),
        torch.cat([timesteps, timesteps]),
        encoder_hidden_states=torch.cat([negative_embeds, embeds]).to(dtype),
    ).sample.float()
    unconditional, conditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)
