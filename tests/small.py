"""A random UNet of the real class for tests of the arithmetic, small and with nothing left out, and its policy."""

import types

import torch

from b2diffurl.ddim import DDIM
from b2diffurl.families.sd import StableDiffusion
from b2diffurl.policy import Policy

SHAPE, TOKENS, WIDTH = (4, 8, 8), 16, 64  # of a latent, and of an embedded prompt


def build_unet():
    """A random UNet with everything that the world's has, and a fifth of its numbers: 8x8 latents, embeddings of 64."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=WIDTH,
        attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    return made.eval().requires_grad_(False)


class AroundUNet(StableDiffusion):
    """Stable Diffusion's family around a UNet that is there already."""

    def __init__(self, unet):
        self.denoiser = self.geometry = unet
        self.config = types.SimpleNamespace(sample=types.SimpleNamespace(resolution=0))


def conditioning(embeds):
    """The Conditioning of embedded prompts (P, L, D)."""
    return {"encoder_hidden_states": embeds}


def build_policy(unet, scheduler, negative, guidance=5.0, eta=1.0):
    """The Policy of a UNet; negative: the embedded empty prompt (1, L, D)."""
    return Policy(AroundUNet(unet), unet, DDIM(scheduler, eta), conditioning(negative), guidance)


def plain_prediction(unet, latents, time, embeds, negative, guidance=5.0):
    """Classifier-free guidance by its formula: a call for each half, without any code of the library."""
    unconditional = unet(latents, time, encoder_hidden_states=negative.expand(embeds.shape)).sample
    conditional = unet(latents, time, encoder_hidden_states=embeds).sample
    return unconditional + guidance * (conditional - unconditional)


def count_rows(unet):
    """(list that gets the number of rows of every call of the UNet, hook to remove)."""
    seen = []
    return seen, unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))


def random_prompts(count, seed=2):
    """The Conditioning of so many random prompts."""
    return conditioning(torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)))


def policy_of(unet, scheduler):
    """A Policy with guidance 5 and η = 1, and random numbers for the empty prompt; scheduler: after set_timesteps."""
    return build_policy(unet, scheduler, random_prompts(1, seed=1)["encoder_hidden_states"])


def one_step(policy, latents, step, cond):
    """Mean and σ of a step (an index) from latents (B, ...), by plain_prediction."""
    steps, name = torch.full((len(latents),), step), "encoder_hidden_states"
    given = policy.kernel.time(steps), cond[name], policy.negative[name]
    return policy.kernel.transition(plain_prediction(policy.denoiser, latents, *given), steps, latents)
