"""Rewards: one file each, one common call `reward(images, prompts) -> float32 (N,)`, higher is better."""


def load_reward(config, device):
    """The reward that config.reward names, loaded once, on the device."""
    from .clip import ClipReward

    return ClipReward(config.reward.model, config.reward.weights, config.reward.batch_size, device)
