"""What can be in a picture, and how it is drawn: vocabulary, random scenes, anti-aliased rendering.

A scene has one or two coloured shapes on a greyish textured background. Coordinates and radii are in pixels of a
SIZE x SIZE picture, y pointing down.
"""

import dataclasses

import numpy as np
import torch

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # 60 degrees of hue apart, in this order
RELATIONS = ("above", "below", "left of", "right of")
BACKGROUNDS = ("plain", "gradient", "stripes", "checks")

# Unit direction from the second object to the first, for "first RELATION second".
DIRECTIONS = np.array([[0, -1], [0, 1], [-1, 0], [1, 0]], dtype=np.float32)


@dataclasses.dataclass
class Scenes:
    """A batch of N scenes with K objects each. Arrays: see the comments; relation is -1 where K is 1."""

    shape: np.ndarray  # (N, K) index into SHAPES
    colour: np.ndarray  # (N, K) index into COLOURS
    centre: np.ndarray  # (N, K, 2) x, y
    radius: np.ndarray  # (N, K)
    rgb: np.ndarray  # (N, K, 3) the colour as painted, in [0, 1]
    relation: np.ndarray  # (N,) index into RELATIONS, of the first object to the second
    grey: np.ndarray  # (N, 3) background colour, in [0, 1]
    texture: np.ndarray  # (N,) index into BACKGROUNDS
    texture_phase: np.ndarray  # (N, 3) angle in radians, period in pixels, contrast

    def __len__(self):
        return len(self.relation)


def hsv_to_rgb(hue, saturation, value):
    """Hue in degrees, the rest in [0, 1]; arrays of one shape -> that shape + (3,)."""
    k = (np.array([5.0, 3.0, 1.0]) + np.asarray(hue)[..., None] / 60) % 6
    ramp = np.clip(np.minimum(k, 4 - k), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)


def _distinct_pair(rng, n, options):
    first = rng.integers(options, size=n)
    return np.stack([first, (first + rng.integers(1, options, size=n)) % options], axis=1)


def sample_scenes(template, n, rng):
    """Draw n random scenes for a template: 'attribute' (one object), 'relation' or 'composition' (two objects).

    The objects of a pair differ in shape; in 'composition' they differ in colour too. rng: numpy Generator.
    """
    if template == "attribute":
        shape, colour = rng.integers(len(SHAPES), size=(n, 1)), rng.integers(len(COLOURS), size=(n, 1))
        radius = rng.uniform(5.5, 10.0, size=(n, 1))
        centre = rng.uniform(radius + 1.5, SIZE - radius - 1.5, size=(2, n, 1)).transpose(1, 2, 0)
        relation = np.full(n, -1)
    elif template in ("relation", "composition"):
        shape = _distinct_pair(rng, n, len(SHAPES))
        colour = rng.integers(len(COLOURS), size=(n, 2))
        if template == "composition":
            colour = _distinct_pair(rng, n, len(COLOURS))
        radius = rng.uniform(4.8, 6.4, size=(n, 2))
        relation = rng.integers(len(RELATIONS), size=n)
        centre = _place_pair(rng, radius, DIRECTIONS[relation])
    else:
        raise ValueError(f"unknown template {template!r}: attribute, relation or composition")
    hue = 60.0 * colour + rng.uniform(-8, 8, size=colour.shape)
    rgb = hsv_to_rgb(hue, rng.uniform(0.8, 1, size=hue.shape), rng.uniform(0.75, 1, size=hue.shape))
    grey = np.clip(rng.uniform(0.15, 0.9, size=(n, 1)) + rng.uniform(-0.03, 0.03, size=(n, 3)), 0, 1)
    phase = np.stack([rng.uniform(0, 2 * np.pi, n), rng.uniform(7, 12, n), rng.uniform(0.06, 0.14, n)], axis=1)
    texture = rng.integers(len(BACKGROUNDS), size=n)
    centre, radius, rgb, grey, phase = (a.astype(np.float32) for a in (centre, radius, rgb, grey, phase))
    return Scenes(shape, colour, centre, radius, rgb, relation, grey, texture, phase)


def _place_pair(rng, radius, direction):
    """Centres (N, 2, 2): first and second object apart along `direction`, shifted less across it, both inside."""
    n = len(radius)
    reach = radius.sum(axis=1)
    gap = rng.uniform(2.0, np.maximum(SIZE - 3 - 2 * reach, 2.01))
    along = (reach + gap)[:, None] * direction
    across = rng.uniform(-3.5, 3.5, size=(n, 1)) * direction[:, ::-1]
    offset = along + across
    low = np.maximum(radius[:, 1:2], radius[:, 0:1] - offset) + 1
    high = np.minimum(SIZE - radius[:, 1:2], SIZE - radius[:, 0:1] - offset) - 1
    second = low + (high - low) * rng.uniform(size=(n, 2))
    return np.stack([second + offset, second], axis=1)


def signed_distance(shape, x, y, radius):
    """Signed distance in pixels (negative inside) of points from one of SHAPES of that radius at the origin.

    x, y, radius: broadcastable tensors. Exact for the circle and the ring, a bound near the outline for the rest.
    """
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.73 * radius).abs() - 0.27 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "cross":
        long, wide = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(long - radius, wide - 0.34 * radius)
    if shape == "triangle":  # apex at (0, -r), base corners at (±r, 0.8 r)
        side = (1.8 * x.abs() - y - radius) / (1 + 1.8**2) ** 0.5
        return torch.maximum(side, y - 0.8 * radius)
    raise ValueError(f"unknown shape {shape!r}")


def coverage(shape_index, centre, radius):
    """Anti-aliased share of every pixel that a shape covers: shapes (...,), centres (..., 2) -> (..., SIZE, SIZE)."""
    axis = torch.arange(SIZE) + 0.5
    x = axis - centre[..., 0, None, None]
    y = axis[:, None] - centre[..., 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    out = torch.zeros(x.shape)
    for index, name in enumerate(SHAPES):
        chosen = shape_index == index
        if chosen.any():
            out[chosen] = (0.5 - signed_distance(name, x[chosen], y[chosen], radius[chosen][..., None, None])).clamp(
                0, 1
            )
    return out


def _background(scenes):
    grey, phase = torch.tensor(scenes.grey), torch.tensor(scenes.texture_phase)
    angle, period, contrast = (phase[:, i, None, None] for i in range(3))
    axis = torch.arange(SIZE) + 0.5
    x, y = axis[None, None, :], axis[None, :, None]
    along = x * angle.cos() + y * angle.sin()
    across = -x * angle.sin() + y * angle.cos()
    stripes = torch.sin(2 * torch.pi * along / period)
    patterns = torch.stack(
        [
            torch.zeros_like(stripes),
            (along - (angle.cos() + angle.sin()) * SIZE / 2) / (SIZE / 2),
            stripes,
            stripes * torch.sin(2 * torch.pi * across / period),
        ]
    )
    pattern = patterns[torch.tensor(scenes.texture), torch.arange(len(scenes))] * contrast
    return (grey[:, :, None, None] + pattern[:, None]).clamp(0, 1)


def render(scenes):
    """Scenes -> float32 pictures (N, 3, SIZE, SIZE) in [0, 1]."""
    picture = _background(scenes)
    for k in range(scenes.shape.shape[1]):
        centre, radius = torch.tensor(scenes.centre[:, k]), torch.tensor(scenes.radius[:, k])
        alpha = coverage(torch.tensor(scenes.shape[:, k]), centre, radius)[:, None]
        picture = picture * (1 - alpha) + alpha * torch.tensor(scenes.rgb[:, k])[:, :, None, None]
    return picture
