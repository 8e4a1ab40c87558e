"""A random UNet of the real class for tests of the arithmetic: small, and with nothing left out."""

import torch


def build_unet():
    """A random UNet with everything that the world's has, and a fifth of its numbers: 8x8 latents, embeddings of 64."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    return made.eval().requires_grad_(False)
