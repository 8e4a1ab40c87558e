"""A random StableDiffusionXLPipeline of the real classes, two million parameters: 16x16 pictures, 77 tokens."""

import tiny
import torch

from b2diffurl.bench import random_weights


def write(folder, **scheduler):
    """Write the pipeline folder; scheduler: further settings of its DDIMScheduler."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    random_weights.write_pipeline(folder / "sd", torch.float32, tiny.GEOMETRY)  # for CLIP's tokenizer
    tokenizer = CLIPTokenizer.from_pretrained(folder / "sd/tokenizer")
    text = CLIPTextConfig(**{**tiny.GEOMETRY["text"], "num_hidden_layers": 2, "projection_dim": 32})
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=32 + 6 * 8, cross_attention_dim=64,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**tiny.GEOMETRY["vae"]), text_encoder=CLIPTextModel(text), unet=unet,
        text_encoder_2=CLIPTextModelWithProjection(text), tokenizer=tokenizer, tokenizer_2=tokenizer,
        scheduler=DDIMScheduler(**{**random_weights.SCHEDULER, **scheduler}), add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
