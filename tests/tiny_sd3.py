"""Random StableDiffusion3Pipelines of the real classes, a hundred thousand parameters: 16x16 pictures."""

import tiny
import torch

from b2diffurl.bench import random_weights

WIDTH = 64  # of T5's hidden states, as wide as the two CLIPs' together


def t5():
    """(tokenizer, encoder) of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "circle": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    return tokenizer, T5EncoderModel(T5Config(vocab_size=8, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def write(folder, with_t5):
    """Write the pipeline folder; with_t5: with a T5 encoder and 3.5's dual attention, else without either."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    random_weights.write_pipeline(folder / "sd", torch.float32, tiny.GEOMETRY)  # for CLIP's tokenizer
    clip = CLIPTokenizer.from_pretrained(folder / "sd/tokenizer")
    text = CLIPTextConfig(**{**tiny.GEOMETRY["text"], "num_hidden_layers": 2, "projection_dim": 32})
    torch.manual_seed(0)
    words, encoder = t5() if with_t5 else (None, None)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=64,
            pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,) if with_t5 else (),
        ),
        vae=AutoencoderKL(**tiny.GEOMETRY["vae"], shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=CLIPTextModelWithProjection(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=clip, tokenizer_2=clip, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder_3=encoder, tokenizer_3=words,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
