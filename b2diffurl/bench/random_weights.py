"""Stable Diffusion v1.4 and an OpenCLIP reward with their published geometry and random weights: for measuring.

Speed, memory and start-up do not depend on what the weights are, so nothing needs to be downloaded.
`python -m b2diffurl.bench.random_weights FOLDER no|fp16|bf16 ARCHITECTURE [GEOMETRY]` writes FOLDER/pipeline and
FOLDER/clip.
"""

import json
import logging
import math
import pathlib
import shutil
import sys

import torch

from ..errors import UserError
from ..families import lora
from ..families.loading import DTYPES

PUBLISHED = "CompVis/stable-diffusion-v1-4"  # the model whose geometry this is

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
GEOMETRY = {"unet": UNET, "vae": VAE, "text": TEXT}
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


def build(geometry=GEOMETRY):
    """The networks of a pipeline on the meta device, without memory or values: {subfolder: model}."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(**geometry["unet"]),
            "vae": AutoencoderKL(**geometry["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**geometry["text"])),
        }


def parameter_count(model):
    """How many numbers the model's weights are."""
    return sum(parameter.numel() for parameter in model.parameters())


def write_pipeline(folder, dtype, geometry=GEOMETRY):
    """Write a Stable Diffusion pipeline folder with random weights in dtype; by default of SD v1.4's geometry."""
    from diffusers import DDIMScheduler
    from open_clip import SimpleTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name, model in build(geometry).items():
        _randomise(model, dtype).save_pretrained(folder / name)
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    byte_pairs = SimpleTokenizer()  # CLIP's own, which OpenCLIP carries
    tokens = {**byte_pairs.encoder, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "tokenizer").mkdir(exist_ok=True)
    vocabulary = {token: i for token, i in tokens.items() if token not in ("<start_of_text>", "<end_of_text>")}
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in byte_pairs.bpe_ranks)])
    (folder / "tokenizer/merges.txt").write_text(merges + "\n", encoding="utf-8")
    settings = {"model_max_length": geometry["text"]["max_position_embeddings"], "pad_token": "<|endoftext|>"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    index = {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def build_clip(architecture):
    """An OpenCLIP model on the meta device. Raises UserError for a name that OpenCLIP does not know."""
    import open_clip

    if architecture not in open_clip.list_models():
        raise UserError(f"{architecture!r} is no OpenCLIP architecture (open_clip.list_models() has their names)")
    logging.disable(logging.WARNING)  # that the weights are random
    with torch.device("meta"):
        model = open_clip.create_model(architecture, load_weights=False, device="meta")
    logging.disable(logging.NOTSET)
    return model


def write_clip(folder, architecture):
    """Write an OpenCLIP folder (for "local-dir:<folder>") of a named architecture with random weights."""
    import open_clip
    from safetensors.torch import save_file

    model = build_clip(architecture)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_randomise(model, torch.float32).state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": open_clip.get_model_config(architecture)}
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_lora(loaded, folder):
    """Save a LoRA that does something, as a fresh one does not -> how many parameters the UNet has without it."""
    policy, parameters = loaded.trainable()
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.05)
    lora.save(policy.denoiser, folder)
    return sum(p.numel() for name, p in policy.denoiser.named_parameters() if ".lora_" not in name)


def provide(config, scratch, quick):
    """Point config to random weights where its models are not on disk -> (none were needed, flags that do the same).

    quick: not to the reward's.
    """
    on_disk, flags = pathlib.Path(config.pretrained.model).is_dir(), []
    ready = on_disk and not config.reward.weights
    if not on_disk and config.pretrained.model != PUBLISHED:
        raise UserError(
            f"config.pretrained.model={config.pretrained.model!r}: give a local pipeline folder; random weights are "
            f"made for {PUBLISHED} alone"
        )
    if not on_disk:
        write_pipeline(scratch / "pipeline", DTYPES[config.mixed_precision])
        config.pretrained.model = str(scratch / "pipeline")
        flags = [f"--config.pretrained.model={config.pretrained.model}"]
    if not quick and config.reward.weights:
        write_clip(scratch / "clip", config.reward.model)
        config.reward.model, config.reward.weights = f"local-dir:{scratch / 'clip'}", ""
        flags += [f"--config.reward.model={config.reward.model}", "--config.reward.weights="]
    return ready, flags


def write(folder, precision, architecture, geometry=GEOMETRY):
    """Write pipeline/ in the precision, and clip/ of an OpenCLIP architecture in float32, into a folder.

    Raises UserError where the disk has no room for them.
    """
    folder, dtype = pathlib.Path(folder), DTYPES[precision]
    count = sum(parameter_count(model) for model in build(geometry).values())
    wanted = dtype.itemsize * count + 4 * parameter_count(build_clip(architecture))
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted + 5e8:
        raise UserError(f"{folder}: {(wanted + 5e8) / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free")
    write_pipeline(folder / "pipeline", dtype, geometry)
    write_clip(folder / "clip", architecture)


if __name__ == "__main__":
    try:
        write(*sys.argv[1:4], *map(json.loads, sys.argv[4:]))
    except UserError as error:
        sys.exit(f"random_weights.py: {error}")
