"""The Gaussian of a transition N(mean, σ²): density and divergence, **averaged** over the latent's dimensions.

The average is DDPO's code's; times the number of dimensions it is the joint density's. Latents are (B, ...), of any
shape; sigma is (B, 1, ...).
"""

import math


def log_prob(value, mean, sigma):
    """Log-density of N(mean, σ²) at value -> (B,) float32."""
    density = -((value.float() - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def residual(log_prob, sigma):
    """How far, in σ, values of such log-densities (B,) are from their mean: root mean square over the dimensions (B,).

    About 1 of what the Gaussian itself drew, more of what another one did.
    """
    return (-2 * (log_prob + sigma.flatten(1).mean(1).log() + 0.5 * math.log(2 * math.pi))).clamp(min=0).sqrt()


def kl(mean, other_mean, sigma):
    """KL(N(mean, σ²) || N(other_mean, σ²)) = (mean - other_mean)² / 2σ² -> (B,).

    Exact, where differences of sampled log-probabilities are estimates.
    """
    return ((mean - other_mean).square() / (2 * sigma**2)).flatten(1).mean(1)
