"""The policy loss on denoising steps. One pure function per algorithm; tensors are (B,), one entry a (sample, step)."""

import torch


def weigh_advantages(normalised, clip, positive_weight=1.0, negative_weight=1.0):
    """A = clamp(r̂, ±clip), times β₁ where A > 0 and β₂ elsewhere (paper eq. 9 and its released form)."""
    advantage = normalised.clamp(-clip, clip)
    return advantage * torch.where(advantage > 0, positive_weight, negative_weight)


def ddpo_is(log_prob, old_log_prob, advantage, clip_range):
    """DDPO's importance-sampled, clipped loss (arXiv 2305.13301 eq. 4 with PPO's clip) -> (B,) losses and statistics.

    ρ = exp(log_prob - old_log_prob); loss = max(-A ρ, -A clip(ρ, 1-ε, 1+ε)). Log-probabilities are averaged over the
    latent's dimensions: for SD's 16384 of them ε = 0.1 is a joint ratio of about exp(1638), so the clip hardly ever
    acts. Statistics, (B,) each, detached: ratio, clipped (whether ρ is outside the range), approx_kl
    (log_prob - old_log_prob)² / 2.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    return loss, {
        "ratio": ratio,
        "clipped": ((ratio - 1).abs() > clip_range).float(),
        "approx_kl": log_ratio.square() / 2,
    }
