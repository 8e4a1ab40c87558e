"""How much pictures of one prompt differ in what the prompt leaves open, as the oracle reads it."""

import numpy as np
import torch

from .oracle import FOREGROUND_CHROMA, read
from .scene import SIZE

BINS = {  # what is read of a picture: edges of its bins, in thirds of what sample_scenes draws for one object
    "x": np.linspace(7, SIZE - 7, 4)[1:-1],
    "y": np.linspace(7, SIZE - 7, 4)[1:-1],
    "radius": np.linspace(5.5, 10.0, 4)[1:-1],
    "background": np.linspace(0.15, 0.9, 4)[1:-1],
}


def brightness(pictures):
    """Mean brightness (N,) of the backgrounds of pictures (N, 3, SIZE, SIZE) in [0, 1]; 0 without any background."""
    return _of_background(pictures.mean(1), pictures)


def texture(pictures):
    """Standard deviation (N,) of the brightness over the background, of pictures as above: 0 where it is plain."""
    light = pictures.mean(1)
    return _of_background((light - brightness(pictures)[:, None, None]) ** 2, pictures).sqrt()


def _of_background(values, pictures):
    grey = pictures.amax(1) - pictures.amin(1) <= FOREGROUND_CHROMA
    return (values * grey).sum((1, 2)) / grey.sum((1, 2)).clamp(min=1)


def open_entropy(images, per_prompt):
    """Entropy in bits of position, size and background brightness among the images of one prompt, mean over prompts.

    images: PIL images of SIZE x SIZE, per_prompt of each prompt in a row. Each of x, y, radius of the largest object
    and brightness falls into one of three bins; the four entropies are added, so 4 log2(3) = 6.34 is the most. Pictures
    without an object are left out, and prompts that have no others. A few images a prompt bias it downwards: compare
    equal numbers only.
    """
    pictures = torch.tensor(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    rows = [
        (found[0].x, found[0].y, found[0].radius, light) if found else None
        for found, light in zip(read(pictures), brightness(pictures).tolist(), strict=True)
    ]
    entropies = []
    for first in range(0, len(rows), per_prompt):
        seen = np.array([row for row in rows[first : first + per_prompt] if row]).reshape(-1, len(BINS))
        if not len(seen):
            continue
        bins = [np.digitize(values, edges) for values, edges in zip(seen.T, BINS.values(), strict=True)]
        entropies.append(sum(_bits(np.bincount(b)) for b in bins))
    return float(np.mean(entropies)) if entropies else 0.0


def _bits(counts):
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
