"""The world's flow-matching model: a StableDiffusion3Pipeline on the same pictures, captions and latents as the UNet's.

`python -m b2diffurl.shapes.flow [--world model/shapes] [--out model/shapes_flow] [--seed 0]` takes the autoencoder and
the text tower of a built world, trains the transformer (over an hour on two cores), writes the pipeline folder, a
picture of what it makes and its figures, and fails if a figure misses its bound.

The text tower's projection is zero, so that the pooled text says nothing. With captions of this few words it would say
everything: a transformer trained with the reward's own projection drew what the pooled text said, whatever the tokens
(0 of 240 pictures followed these where the two differed), and a LoRA of its attention learned prompts by heart.
"""

import argparse
import functools
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F

from . import clip, diffusion
from .build import base_figures, conclude, progress

BATCH = 128
ROUNDS = (  # steps, learning rate, and each template's part of the scenes; a round begins with the last one's average
    (7500, 1.5e-3, diffusion.SHARES),
    (6000, 1e-3, {"attribute": 0.5, "relation": 0.25, "composition": 0.25}),
)
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
    """Train the transformer on the UNet's kind of data, with its wrong captions; returns the average of its weights.

    The loss is flow matching's: the squared error of the velocity ε - x0 at (1-σ) x0 + σ ε, with σ the logistic
    function of a standard normal number (SD3, arXiv 2403.03206, section 3.1).
    """
    torch.manual_seed(seed)
    transformer = build_transformer(encoder.config.hidden_size)
    for number, (steps, learning_rate, shares) in enumerate(ROUNDS):
        torch.manual_seed(seed + number)
        latents, labels, captions = diffusion.dataset(vae, np.random.default_rng(seed + number), progress, shares)
        text = embed_captions(encoder, tokenizer, [*captions, ""])
        draw = functools.partial(loss, transformer.requires_grad_(True).train(), latents, labels, text)
        counter = progress(range(steps), f"flow transformer, round {number}")
        transformer = diffusion.fit(transformer, draw, steps, learning_rate, counter)
    return transformer


def loss(transformer, latents, labels, text):
    """Flow matching's loss of a random batch; latents (N, ...), labels (N,) of the rows of text, the empty one last."""
    hidden, pooled = text
    chosen = torch.randint(len(latents), (BATCH,))
    label = labels[chosen].masked_fill(torch.rand(BATCH) < diffusion.CAPTION_DROPOUT, len(hidden) - 1)
    x0, noise, sigma = latents[chosen], torch.randn(BATCH, *latents.shape[1:]), torch.randn(BATCH).sigmoid()
    noisy = torch.lerp(x0, noise, sigma[:, None, None, None])
    given = {"encoder_hidden_states": hidden[label], "pooled_projections": pooled[label]}
    return F.mse_loss(transformer(noisy, timestep=1000 * sigma, **given).sample, noise - x0)


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
    tokenizer = CLIPTokenizer.from_pretrained(arguments.world / "clip")  # anew: the other remembers how it was used
    save_pipeline(out / "pipeline", vae, encoder, tokenizer, transformer)
    figures = base_figures(load_pipeline(out / "pipeline"), out / "base.png", max_sequence_length=0)
    conclude(out, arguments.seed, figures, started, BOUNDS)


if __name__ == "__main__":
    main()
