"""Classifier-free guidance, one function for sampling and training: what is trained is exactly what sampled.

A Conditioning is {the denoiser's own argument: tensor (B, ...)}, what a prompt is to it.
"""

import torch

Conditioning = dict[str, torch.Tensor]


def guided(denoiser, latents, time, cond, negative, scale):
    """e_uncond + scale (e_cond - e_uncond), float32 (B, ...), both halves in one call of the denoiser.

    denoiser(latents, time, cond) -> its output. latents (B, ...), time (B,), cond: Conditioning (B, ...), negative:
    that of the empty prompt (1, ...).
    """
    halves = {name: torch.cat([negative[name].expand(len(latents), *own.shape[1:]), own]) for name, own in cond.items()}
    both = denoiser(torch.cat([latents, latents]), torch.cat([time, time]), halves).float()
    unconditional, conditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def take(cond, rows):
    """The Conditioning of some of its rows, in their order."""
    return {name: tensor[rows] for name, tensor in cond.items()}


def to_device(cond, device):
    """The Conditioning on a device."""
    return {name: tensor.to(device) for name, tensor in cond.items()}
