"""All randomness of a picture, as a pure function of (seed, stage, group, branch): never of batch or device."""

import hashlib

import torch


def stream_seed(seed, stage, group, branch):
    """A 63-bit seed for one noise stream; distinct arguments give unrelated streams.

    branch is a number for a branch's own steps and "prefix" for what a group's branches share.
    """
    digest = hashlib.sha256(f"{seed}/{stage}/{group}/{branch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream_noise(seed, steps, shape):
    """Standard normal noise (steps, *shape), float32 on the CPU: the first `steps` draws of a stream."""
    return torch.randn((steps, *shape), generator=torch.Generator().manual_seed(seed))


def draw_prompts(seed, stage, prompt_count, groups):
    """Indices (groups,) of a stage's prompts, drawn uniformly with replacement."""
    generator = torch.Generator().manual_seed(stream_seed(seed, stage, "all", "prompts"))
    return torch.randint(prompt_count, (groups,), generator=generator).tolist()
