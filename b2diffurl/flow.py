"""One step of a flow-matching model as a Gaussian: x_σ = (1-σ) x0 + σ ε, velocity v = ε - x0, σ from 1 (noise) to 0.

So x̂0 = x - σ v and ε̂ = x + (1-σ) v. The Euler step of the ODE is made random in one of three ways:

* cps: coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952). The mean is (1-σ') x̂0 + √(σ'² - τ²) ε̂ and the
  standard deviation τ = σ' sin(aπ/2), so that the step's marginal is exactly that of σ'. It is DDIM's transition with
  (√ā', √(1-ā')) replaced by (1-σ', σ'); a = 0 is the ODE.
* flow_sde: Euler-Maruyama with diffusion s = a √(σ / (1-σ)) (Flow-GRPO, arXiv 2505.05470); at σ = 1 the root's
  denominator takes σ'.
* dance_sde: Euler-Maruyama with s = a (DanceGRPO, arXiv 2505.07818).

Euler-Maruyama adds the score's drift: mean = x + v dt + s² / (2σ) ε̂ dt with dt = σ' - σ, standard deviation s √-dt. Its
marginals are exact only for small steps.
"""

import dataclasses
import math

SAMPLERS = ("cps", "flow_sde", "dance_sde")


def transition(velocity, latents, sigma, sigma_next, noise_level, sampler):
    """Mean (B, ...) and standard deviation (B, 1, ...), float32, of the step from σ to σ' < σ.

    velocity, latents: (B, ...). sigma, sigma_next: numbers or tensors (B,) or (B, 1, ...). noise_level: a of the
    sampler, one of SAMPLERS; 0 is the ODE, with a standard deviation of 0. Raises ValueError for another sampler, or
    for a noise level that is negative or, with cps, above 1.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: {', '.join(SAMPLERS)}")
    if noise_level < 0 or (sampler == "cps" and noise_level > 1):
        raise ValueError(f"noise_level={noise_level}: must be at least 0, and with cps at most 1")
    x, v = latents.float(), velocity.float()
    sigma, sigma_next = (_over(value, x) for value in (sigma, sigma_next))
    x0, noise = x - sigma * v, x + (1 - sigma) * v
    if sampler == "cps":
        std = sigma_next * math.sin(noise_level * math.pi / 2)
        return (1 - sigma_next) * x0 + (sigma_next**2 - std**2).clamp(min=0).sqrt() * noise, std
    step, diffusion = sigma_next - sigma, sigma.new_full(sigma.shape, noise_level)
    if sampler == "flow_sde":
        diffusion = noise_level * (sigma / (1 - sigma.where(sigma < 1, sigma_next))).sqrt()
    return x + v * step + diffusion**2 / (2 * sigma) * noise * step, diffusion * (-step).sqrt()


def _over(value, latents):
    """A number or a tensor (B,) or (B, 1, ...) as float32 (B, 1, ...), to broadcast over latents (B, ...)."""
    import torch

    value = torch.as_tensor(value, dtype=torch.float32, device=latents.device).flatten().expand(len(latents))
    return value.view(-1, *[1] * (latents.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Flow:
    """The kernel of a flow-matching model: its transitions by step index, 0 (pure noise) to T-1, a step of the ODE."""

    scheduler: object  # a FlowMatchEulerDiscreteScheduler after set_timesteps(T); its σ's are sampling's and training's
    noise_level: float
    sampler: str
    random_from: int = 0  # the first step with noise; those before it are the ODE's, as the last one is
    initial_sigma = 1.0

    def time(self, step):
        """What the denoiser is told at the steps (B,): 1000 σ (B,)."""
        return self.scheduler.timesteps[step]

    def transition(self, prediction, step, latents):
        """Mean (B, ...) and standard deviation (B, 1, ...), float32, of the steps (B,) from latents with velocities."""
        sigmas = self.scheduler.sigmas
        given = prediction, latents, sigmas[step], sigmas[step + 1]
        mean, std = transition(*given, self.noise_level, self.sampler)
        ode = _over((step == len(sigmas) - 2) | (step < self.random_from), latents)
        return mean.where(ode == 0, transition(*given, 0.0, self.sampler)[0]), std * (1 - ode)

    def gain(self, step):
        """By how many standard deviations a unit change of the velocity moves the mean, at a step: a number."""
        sigmas = self.scheduler.sigmas
        none = sigmas.new_zeros(1, 1)
        mean, std = transition(none + 1, none, sigmas[step], sigmas[step + 1], self.noise_level, self.sampler)
        return (mean / std).abs().item()
