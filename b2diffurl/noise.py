"""All randomness of a picture, as a pure function of (seed, stage, group, branch): never of batch or device.

The streams are numpy's Philox, a counter-based generator whose normal numbers are made one by one in scalar code.
PyTorch's CPU generator seeds itself with 32 bits alone, and vectorises by what the processor has.
"""

import hashlib

import numpy as np


def stream_seed(seed, stage, group, branch):
    """A 63-bit seed for one noise stream; distinct arguments give unrelated streams.

    branch is a number for a branch's own steps and "prefix" for what a group's branches share.
    """
    digest = hashlib.sha256(f"{seed}/{stage}/{group}/{branch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed):
    """numpy's Generator of a stream: all 63 bits of the seed are Philox's key."""
    return np.random.Generator(np.random.Philox(key=seed))


def stream_noise(seed, steps, shape):
    """Standard normal noise (steps, *shape), float32 on the CPU: the first `steps` draws of a stream."""
    import torch

    return torch.from_numpy(stream(seed).standard_normal((steps, *shape), dtype=np.float32))


def draw_prompts(seed, stage, prompt_count, groups, probabilities=None):
    """Indices (groups,) of a stage's prompts, drawn with replacement, uniformly unless probabilities (P,) are given."""
    own = stream(stream_seed(seed, stage, "all", "prompts"))
    if probabilities is None:
        return own.integers(prompt_count, size=groups).tolist()
    return own.choice(prompt_count, size=groups, p=probabilities).tolist()
