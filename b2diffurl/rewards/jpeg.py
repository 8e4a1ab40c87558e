"""JPEG size, DDPO's tasks without any model (arXiv 2305.13301 section 5.1)."""

import io

import torch

QUALITY = 95


def incompressibility(images, prompts):
    """PIL images -> (N,) float32, the size of each as a JPEG of quality 95, in kB (1000 bytes)."""
    sizes = []
    for image in images:
        stream = io.BytesIO()
        image.save(stream, format="JPEG", quality=QUALITY)
        sizes.append(stream.tell() / 1000)
    return torch.tensor(sizes)


def compressibility(images, prompts):
    """The negative of incompressibility: smaller files are better."""
    return -incompressibility(images, prompts)
