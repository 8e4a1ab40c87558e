"""Rewards: one file each, one common call `reward(images, prompts) -> (N,)`, higher is better.

images are N PIL images, prompts N strings; config.reward.name is "clip" or your own "package.module:function".
"""

import importlib

import torch

from ..configuration import UserError


def load_reward(config, device):
    """The reward that config.reward.name names, loaded once; a user's function is taken as it is."""
    if config.reward.name == "clip":
        return load_clip(config, device)
    module, _, function = config.reward.name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"config.reward.name={config.reward.name!r} does not load: {error}") from None


def load_clip(config, device):
    """The OpenCLIP model of config.reward: the reward "clip", and the features of the diversity measure."""
    from .clip import ClipReward

    return ClipReward(config.reward.model, config.reward.weights, config.reward.batch_size, device)


def score(reward, config, images, prompts):
    """reward(images, prompts), checked -> float64 numpy (N,). UserError for another shape or a non-finite score."""
    raw = torch.as_tensor(reward(images, prompts)).detach().double().cpu()
    if raw.shape != (len(images),):
        shape = tuple(raw.shape)
        raise UserError(f"config.reward.name={config.reward.name!r} returned shape {shape}, not ({len(images)},)")
    if bad := int((~raw.isfinite()).sum()):
        first = prompts[int((~raw.isfinite()).nonzero()[0])]
        raise UserError(
            f"config.reward.name={config.reward.name!r} returned {bad} non-finite scores of {len(raw)}, the first for "
            f"{first!r}: nothing was written; mend the reward and run the same command again"
        )
    return raw.numpy()
