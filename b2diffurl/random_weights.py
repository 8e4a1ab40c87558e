"""Stable Diffusion v1.4 and an OpenCLIP reward with their published geometry and random weights: for measuring.

Speed, memory and start-up do not depend on what the weights are, so nothing needs to be downloaded.
"""

import json
import logging
import math

import torch

TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip
UNET = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
VAE = {
    "sample_size": 512, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
    "steps_offset": 1, "clip_sample": False,
}  # fmt: skip


def _randomise(model, dtype):
    """Memory and values for a model made on the meta device: uniform in ±1/sqrt(fan-in), norms 1, biases 0.

    One block of noise is used again and again: drawing a billion numbers would take longer than measuring with them.
    """
    model = torch.nn.Module.to(model, dtype).to_empty(device="cpu")
    noise = torch.empty(1 << 20, dtype=dtype).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            fan_in = parameter[0].numel() or 1
            for part in parameter.view(-1).split(len(noise)):
                torch.mul(noise[: len(part)], 1 / math.sqrt(fan_in), out=part)
    return model.requires_grad_(False).eval()


def write_pipeline(folder, dtype, unet=UNET, vae=VAE, text=TEXT):
    """Write a Stable Diffusion pipeline folder with random weights in dtype; the defaults are SD v1.4's geometry."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from open_clip import SimpleTokenizer
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
    for name, model in parts.items():
        _randomise(model, dtype).save_pretrained(folder / name)
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    byte_pairs = SimpleTokenizer()  # CLIP's own, which OpenCLIP carries
    tokens = {**byte_pairs.encoder, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "tokenizer").mkdir(exist_ok=True)
    vocabulary = {token: i for token, i in tokens.items() if token not in ("<start_of_text>", "<end_of_text>")}
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in byte_pairs.bpe_ranks)])
    (folder / "tokenizer/merges.txt").write_text(merges + "\n", encoding="utf-8")
    settings = {"model_max_length": text["max_position_embeddings"], "pad_token": "<|endoftext|>"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    index = {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_clip(folder, architecture):
    """Write an OpenCLIP folder (for "local-dir:<folder>") of a named architecture with random weights."""
    import open_clip
    from safetensors.torch import save_file

    settings = open_clip.get_model_config(architecture)
    logging.disable(logging.WARNING)  # that the weights are random
    model = open_clip.create_model(architecture, load_weights=False, device="meta")
    logging.disable(logging.NOTSET)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_randomise(model, torch.float32).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}), encoding="utf-8")
