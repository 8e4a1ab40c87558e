"""The world's flow-matching model: a StableDiffusion3Pipeline on the same pictures, captions and latents as the UNet's.

`python -m b2diffurl.shapes.flow [--world model/shapes] [--out model/shapes_flow] [--seed 0]` takes the autoencoder and
the text tower of a built world, trains the transformer (under an hour on two cores), writes the pipeline folder, a
picture of what it makes and its figures, and fails if a figure misses its bound.
"""

import argparse
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F

from . import clip, diffusion
from .build import base_figures, conclude, progress

STEPS, BATCH, LEARNING_RATE = 7500, 128, 1.5e-3
BOUNDS = {"base_attribute": (0.35, 0.75), "base_relation": (0.02, 1.0), "base_composition": (0.02, 1.0)}


def build_transformer(width):
    """An untrained SD3Transformer2DModel of the world's size: 64 tokens of 8x8 latents, 1.3 M parameters.

    width: of the text tower's hidden states, of which the pipeline puts two beside each other.
    """
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=24,
        caption_projection_dim=96,
        joint_attention_dim=2 * width,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def build_scheduler():
    """Flow matching with SD3's shift.

    Without it the outcome is decided within the first third of 20 steps, before the paper's first interval; the shift
    gives high noise more of the steps.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


@torch.no_grad()
def embed_captions(encoder, tokenizer, captions):
    """Captions -> the pipeline's text (N, L, 2 D) and pooled text (N, 2 D): its two towers are the same one, no T5."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    found = encoder(ids, output_hidden_states=True)
    return torch.cat([found.hidden_states[-2]] * 2, -1), torch.cat([found.text_embeds] * 2, -1)


def train(vae, encoder, tokenizer, seed, progress):
    """Train the transformer on the UNet's data, with its wrong captions; returns the average of its weights.

    The loss is flow matching's: the squared error of the velocity ε - x0 at (1-σ) x0 + σ ε, with σ the logistic
    function of a standard normal number (SD3, arXiv 2403.03206, section 3.1).
    """
    torch.manual_seed(seed)
    latents, labels, captions = diffusion.dataset(vae, np.random.default_rng(seed), progress)
    hidden, pooled = embed_captions(encoder, tokenizer, [*captions, ""])
    transformer = build_transformer(encoder.config.hidden_size)

    def loss(chosen):
        label = labels[chosen].masked_fill(torch.rand(BATCH) < diffusion.CAPTION_DROPOUT, len(captions))
        x0, noise, sigma = latents[chosen], torch.randn(BATCH, *latents.shape[1:]), torch.randn(BATCH).sigmoid()
        noisy = torch.lerp(x0, noise, sigma[:, None, None, None])
        text = {"encoder_hidden_states": hidden[label], "pooled_projections": pooled[label]}
        return F.mse_loss(transformer(noisy, timestep=1000 * sigma, **text).sample, noise - x0)

    draw = lambda: loss(torch.randint(len(latents), (BATCH,)))  # noqa: E731
    return diffusion.fit(transformer, draw, STEPS, LEARNING_RATE, progress(range(STEPS), "flow transformer"))


def save_pipeline(folder, vae, encoder, tokenizer, transformer):
    """Write the folder that load_pipeline reads."""
    from diffusers import StableDiffusion3Pipeline

    vae.register_to_config(shift_factor=0.0)  # of which this pipeline has no default
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def load_pipeline(folder):
    """The library's pipeline of the folder, which has no T5; a call of it takes max_sequence_length=0."""
    from diffusers import StableDiffusion3Pipeline

    without = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **without)


def main():
    """Train, save, measure, and exit 1 if a figure misses its bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=pathlib.Path, default=pathlib.Path("model/shapes"), help="a built world")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("model/shapes_flow"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    arguments = parser.parse_args()
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    started, out = time.perf_counter(), arguments.out
    vae = AutoencoderKL.from_pretrained(arguments.world / "pipeline", subfolder="vae").eval()
    encoder = clip.text_encoder(arguments.world / "clip", projection=True)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.world / "clip")
    transformer = train(vae, encoder, tokenizer, arguments.seed, progress)
    save_pipeline(out / "pipeline", vae, encoder, tokenizer, transformer)
    figures = base_figures(load_pipeline(out / "pipeline"), out / "base.png", max_sequence_length=0)
    conclude(out, arguments.seed, figures, started, BOUNDS)


if __name__ == "__main__":
    main()
