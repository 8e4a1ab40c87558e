"""A ladder of rewards, each sparser: 1 where a picture is right by the oracle and meets further conditions, else 0.

`config.reward.name=b2diffurl.shapes.ladder:right_dark` and so on. No prompt asks for the conditions, which the base
model meets by chance: of 864 pictures of the study's prompts, guidance 5, 0.69 are `right`, 0.31 `right_plain`, 0.29
`right_dark`, 0.07 `right_left`, 0.03 `right_dark_left`. They train on the oracle's verdict, which all other rewards
meet in the evaluation alone.
"""

import numpy as np
import torch

from .oracle import read, verdicts
from .variety import brightness, texture

DARK = 0.4  # brightness of the background, which is drawn from 0.15 to 0.9
PLAIN = 0.022  # standard deviation of the background's brightness; the drawn ones have 0 to 0.1
LEFT = 13.5  # pixels, of the largest object's centre; with guidance it is seldom far from the middle


def right(images, prompts):
    """N PIL images of the world, N prompts -> (N,) of 0 and 1, as all rewards here; ValueError for another world's."""
    found = verdicts(images, prompts)
    if found is None:
        raise ValueError("these rewards judge the miniature world's pictures and prompts alone (docs/rewards.md)")
    return found


def right_dark(images, prompts):
    """Right, on a dark background."""
    return right(images, prompts) * _dark(images)


def right_plain(images, prompts):
    """Right, on a background without texture, which is decided later than whether it is right or dark."""
    return right(images, prompts) * (texture(_pictures(images)) < PLAIN).numpy()


def right_left(images, prompts):
    """Right, left of LEFT."""
    return right(images, prompts) * _left(images)


def right_dark_left(images, prompts):
    """Right, on a dark background, left of LEFT."""
    return right_dark(images, prompts) * _left(images)


def _pictures(images):
    return torch.tensor(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255


def _dark(images):
    return (brightness(_pictures(images)) < DARK).numpy().astype(float)


def _left(images):
    return np.array([bool(found) and found[0].x < LEFT for found in read(_pictures(images))], dtype=float)
