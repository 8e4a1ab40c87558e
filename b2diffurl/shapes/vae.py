"""The world's autoencoder: diffusers' AutoencoderKL, 32x32 pictures to 4x8x8 latents, trained on rendered scenes."""

import numpy as np
import torch
import torch.nn.functional as F

from . import oracle
from .captions import TEMPLATES, caption_scenes
from .scene import SIZE, render, sample_scenes

STEPS, BATCH, LEARNING_RATE = 4000, 32, 2e-3
KL_WEIGHT = 1e-5  # only keeps the latents bounded; the diffusion model brings the prior


def scene_pictures(n, rng):
    """n pictures in [-1, 1], a third from each template."""
    counts = [n // 3, n // 3, n - 2 * (n // 3)]
    drawn = [render(sample_scenes(t, c, rng)) for t, c in zip(TEMPLATES, counts, strict=True)]
    return torch.cat(drawn) * 2 - 1


def build():
    """An untrained AutoencoderKL of the world's size."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=1.0,
    )


def train(seed, progress):
    """Train from scratch; sets config.scaling_factor to one over the latents' standard deviation, as SD does."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = build().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.03)
    for _ in progress(range(STEPS), "autoencoder"):
        pictures = scene_pictures(BATCH, rng)
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(decoded, pictures) + 2 * F.mse_loss(decoded, pictures) + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(scene_pictures(1000, rng)).latent_dist.sample()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


@torch.no_grad()
def round_trip(vae, template, n, seed):
    """(share of n clean renders that the oracle still reads right after encoding and decoding, PSNR in dB)."""
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(template, n, rng)
    pictures = render(scenes)
    latents = vae.encode(pictures * 2 - 1).latent_dist.mode()
    decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    right = oracle.holds(decoded, caption_scenes(template, scenes)).float().mean().item()
    return right, (-10 * (decoded - pictures).square().mean().log10()).item()
