"""The world's diffusion model: a small UNet2DConditionModel trained on latents of scenes with partly wrong captions."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from . import oracle
from .captions import TEMPLATES, all_captions, caption_scenes
from .scene import render, sample_scenes

SCENES, SHARES = 80_000, {"attribute": 0.25, "relation": 0.35, "composition": 0.40}
STEPS, BATCH, LEARNING_RATE = 7500, 128, 1.5e-3
CAPTION_DROPOUT = 0.10  # share of samples that see the empty prompt, for classifier-free guidance
EMA_DECAY = 0.999


def build_unet(cross_attention_dim):
    """An untrained UNet of the world's size: 8x8 latents, cross-attention at both levels, about 1.1 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler():
    """DDIM with DDPM's linear betas.

    On 8x8 latents SD's own betas leave the picture readable until the first few of 20 steps, so that it is decided at
    once; the linear betas add noise sooner and move the decision into the steps that the paper's intervals train.
    steps_offset must be 1: with 0 the last step has no variance and no log-probability.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.02,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


@torch.no_grad()
def embed_captions(text_encoder, tokenizer, captions):
    """Captions -> the text encoder's last hidden states (N, L, D)."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids).last_hidden_state


@torch.no_grad()
def dataset(vae, rng, progress, shares=SHARES):
    """Scaled latents (N, 4, 8, 8) of random scenes, per scene the index of its (sometimes wrong) caption, all captions.

    shares: {template: its part of the scenes}.
    """
    captions = [c for t in TEMPLATES for c in all_captions(t)]
    index = {c: i for i, c in enumerate(captions)}
    latents, labels = [], []
    for template in TEMPLATES:
        count = round(shares[template] * SCENES / 1000)
        for _ in progress(range(count), f"encoding {template} scenes"):
            scenes = sample_scenes(template, 1000, rng)
            latents.append(vae.encode(render(scenes) * 2 - 1).latent_dist.mode() * vae.config.scaling_factor)
            labels += [index[c] for c in caption_scenes(template, scenes, rng)]
    return torch.cat(latents), torch.tensor(labels), captions


def train(vae, text_encoder, tokenizer, seed, progress):
    """Train the UNet from scratch on noisy captions; returns the exponential moving average of its weights."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    latents, labels, captions = dataset(vae, rng, progress)
    embeddings = embed_captions(text_encoder, tokenizer, [*captions, ""])
    unet, scheduler = build_unet(embeddings.shape[-1]), build_scheduler()

    def loss(chosen):
        label = labels[chosen].masked_fill(torch.rand(BATCH) < CAPTION_DROPOUT, len(captions))
        noise, timesteps = torch.randn(BATCH, *latents.shape[1:]), torch.randint(1000, (BATCH,))
        noisy = scheduler.add_noise(latents[chosen], noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, embeddings[label]).sample, noise)

    draw = lambda: loss(torch.randint(len(latents), (BATCH,)))  # noqa: E731
    return fit(unet, draw, STEPS, LEARNING_RATE, progress(range(STEPS), "diffusion UNet"))


def fit(network, loss, steps, learning_rate, counter):
    """So many steps of AdamW on loss(); returns the exponential moving average of the network's weights."""
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.03)
    for step in counter:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    return average.eval()


@torch.no_grad()
def base_alignment(pipeline, prompts, images_per_prompt, seed, **options):
    """(share of generated pictures the oracle accepts, pictures (N, 3, 32, 32) in [0, 1], their prompts).

    options: of the pipeline's call beside guidance 5 and 20 steps.
    """
    repeated = [p for p in prompts for _ in range(images_per_prompt)]
    pictures = []
    for start in range(0, len(repeated), 256):
        output = pipeline(
            repeated[start : start + 256],
            num_inference_steps=20,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="pt",
            **options,
        )
        pictures.append(output.images)
    pictures = torch.cat(pictures)
    return oracle.holds(pictures, repeated).float().mean().item(), pictures, repeated
