"""Stable Diffusion's kind of pipeline at a size that is made and run within seconds: 16x16 pictures, 77 tokens."""

from b2diffurl.bench import random_weights

GEOMETRY = {
    "unet": {
        "sample_size": 8, "block_out_channels": (32, 64), "cross_attention_dim": 32, "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "vae": {
        "sample_size": 16, "block_out_channels": (32, 32), "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "text": {
        **random_weights.TEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}  # fmt: skip
CLIP = "ViT-S-32-alt"  # the smallest of OpenCLIP's
