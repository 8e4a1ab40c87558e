"""Make the whole world from nothing: `python -m b2diffurl.shapes.build [--out model/shapes] [--seed 0]`.

Trains the reward, the autoencoder and the diffusion UNet in turn (about an hour on two cores), writes the pipeline and
OpenCLIP folders, the prompt lists and the model card, and fails if a figure misses its bound.
"""

import argparse
import json
import pathlib
import platform
import sys
import time

import numpy as np
import torch
from PIL import Image

from . import clip, diffusion, oracle, vae
from .captions import TEMPLATES, caption_scenes, prompt_lists, swap
from .scene import render, sample_scenes

# Every figure is a share; (low, high) bounds are what the project promises of the world.
BOUNDS = {
    "oracle_clean": (0.99, 1.0),
    "oracle_false_yes": (0.0, 0.01),
    "vae_oracle": (0.97, 1.0),
    "reward_swap": (0.97, 1.0),
    "base_attribute": (0.40, 0.75),
    "base_relation": (0.25, 1.0),
    "base_composition": (0.25, 1.0),
}


def progress(steps, label):
    """A progress bar for long work."""
    from tqdm import tqdm

    return tqdm(steps, desc=label)


def save_pipeline(folder, autoencoder, text_encoder, tokenizer, unet):
    """Write the folder that StableDiffusionPipeline.from_pretrained loads."""
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusion.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_prompt_lists(folder):
    """prompts/shapes_<template>_{train,test}.json."""
    for template in TEMPLATES:
        for name, prompts in zip(("train", "test"), prompt_lists(template), strict=True):
            text = json.dumps(prompts, indent=2) + "\n"
            (folder / f"shapes_{template}_{name}.json").write_text(text, encoding="utf-8")


def oracle_rates(template, n, seed):
    """(share of n clean renders that the oracle accepts, share that it accepts under the swapped caption)."""
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(template, n, rng)
    pictures, captions = render(scenes), caption_scenes(template, scenes)
    swapped = [swap(caption, rng) for caption in captions]
    return tuple(oracle.holds(pictures, texts).float().mean().item() for texts in (captions, swapped))


def measure(folder, contact_sheet):
    """All figures of a built world, by name; also draws base pictures, a row a template, into contact_sheet."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", local_files_only=True)
    figures = {}
    for template in TEMPLATES:
        right, wrong = oracle_rates(template, 3000, seed=4)
        figures[f"oracle_clean_{template}"], figures[f"oracle_false_yes_{template}"] = right, wrong
        right, psnr = vae.round_trip(pipeline.vae, template, 2000, seed=1)
        figures[f"vae_oracle_{template}"], figures[f"vae_psnr_{template}"] = right, psnr
        figures[f"reward_swap_{template}"] = clip.swap_accuracy(folder / "clip", template, 2000, seed=2)
    return {**figures, **base_figures(pipeline, contact_sheet, eta=1.0)}


def base_figures(pipeline, contact_sheet, **options):
    """The base alignments by name; also draws pictures, a row a template. options: of the pipeline's call."""
    figures, rows = {}, []
    pipeline.set_progress_bar_config(disable=True)
    for template in TEMPLATES:
        prompts = [p for prompts in prompt_lists(template) for p in prompts]
        share, pictures, _ = diffusion.base_alignment(pipeline, prompts, -(-720 // len(prompts)), seed=3, **options)
        figures[f"base_{template}"] = share
        chosen = pictures[torch.linspace(0, len(pictures) - 1, 12).long()]
        rows.append(torch.cat(list(chosen), dim=2))
    sheet = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(sheet)
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(contact_sheet)
    return figures


def misses(figures, bounds=BOUNDS):
    """The figures outside their bounds, as lines of text."""
    lines = []
    for name, value in figures.items():
        for start, (low, high) in bounds.items():
            if name.startswith(start) and not low <= value <= high:
                lines.append(f"{name} = {value:.3f} is outside [{low}, {high}]")
    return lines


def main():
    """Build, measure, and exit 1 if a figure misses its bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("model/shapes"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--prompts", type=pathlib.Path, default=pathlib.Path("prompts"), help="folder of the lists")
    arguments = parser.parse_args()
    from transformers import CLIPTokenizer

    started, out = time.perf_counter(), arguments.out
    clip.train(out / "clip", arguments.seed, progress)
    autoencoder = vae.train(arguments.seed, progress)
    text_encoder = clip.text_encoder(out / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(out / "clip")
    unet = diffusion.train(autoencoder, text_encoder, tokenizer, arguments.seed, progress)
    save_pipeline(out / "pipeline", autoencoder, text_encoder, tokenizer, unet)
    write_prompt_lists(arguments.prompts)
    figures = measure(out, out / "base.png")
    conclude(out, arguments.seed, figures, started, BOUNDS)


def conclude(out, seed, figures, started, bounds):
    """Write figures.json into out and print it; exits 1 if a figure misses its bound. started: by time.perf_counter."""
    figures["build_minutes"] = (time.perf_counter() - started) / 60
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    (out / "figures.json").write_text(json.dumps({"machine": machine, "seed": seed, **figures}, indent=2) + "\n")
    print("\n".join(f"{name:<28}{value:8.3f}" for name, value in figures.items()))
    if lines := misses(figures, bounds):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
