"""The published geometry of the presets' models: what their configuration files say of denoiser and VAE.

With it a model's memory can be counted without fetching a byte of it.
"""

import json

UNETS = {
    "CompVis/stable-diffusion-v1-4": {
        "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
TRANSFORMERS = {
    "stabilityai/stable-diffusion-3.5-medium": ("SD3Transformer2DModel", {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    }),
    "black-forest-labs/FLUX.1-dev": ("FluxTransformer2DModel", {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }),
}  # fmt: skip
PIPELINES = {"SD3Transformer2DModel": "StableDiffusion3Pipeline", "FluxTransformer2DModel": "FluxPipeline"}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def write(folder, model):
    """Write model_index.json and the configurations of denoiser and VAE of a hub's model: a pipeline without weights.

    Raises KeyError for a model that is none of the presets'.
    """
    if model in UNETS:
        xl = "addition_embed_type" in UNETS[model]
        kind, own, component = "UNet2DConditionModel", UNETS[model], "unet"
        pipeline = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    else:
        kind, own = TRANSFORMERS[model]
        component, pipeline = "transformer", PIPELINES[kind]
    vae = {**VAE, "latent_channels": 4 if model in UNETS else 16}
    for name, settings in {
        component: {"_class_name": kind, **own},
        "vae": {"_class_name": "AutoencoderKL", **vae},
    }.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}), encoding="utf-8")
