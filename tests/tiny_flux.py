"""A random FluxPipeline of the real classes, eighty thousand parameters: 16x16 pictures."""

import tiny
import tiny_sd3
import torch

from b2diffurl.bench import random_weights


def write(folder, guidance_embeds=True):
    """Write the pipeline folder; guidance_embeds: as FLUX.1-dev, else as schnell."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    random_weights.write_pipeline(folder / "sd", torch.float32, tiny.GEOMETRY)  # for CLIP's tokenizer
    text = CLIPTextConfig(**tiny.GEOMETRY["text"])
    torch.manual_seed(0)
    tokenizer, t5 = tiny_sd3.t5()
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=tiny_sd3.WIDTH, pooled_projection_dim=32,
            guidance_embeds=guidance_embeds, axes_dims_rope=(4, 4, 8),
        ),
        vae=AutoencoderKL(**tiny.GEOMETRY["vae"], shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=CLIPTextModel(text), tokenizer=CLIPTokenizer.from_pretrained(folder / "sd/tokenizer"),
        text_encoder_2=t5, tokenizer_2=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
