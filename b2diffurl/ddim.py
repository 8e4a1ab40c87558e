"""One DDIM transition as a Gaussian policy: the step that samples, and its log-probability (paper section 3, DDPO).

Symbols of the DDIM paper (arXiv 2010.02502): a is the cumulative product of alphas, sigma(eta) its eq. 16, the mean its
eq. 12.
"""

import dataclasses

import torch

from . import gaussian


def transition(scheduler, noise_pred, timesteps, sample, eta):
    """Mean (B, C, H, W) and standard deviation (B, 1, 1, 1), float32, of p(x_prev | x_t), DDIM eq. 12 and 16.

    scheduler: a DDIMScheduler after set_timesteps. noise_pred: the model's output for `sample`, read as the scheduler's
    prediction_type says (epsilon, sample or v_prediction). timesteps: (B,) training timesteps. The previous timestep is
    clamped at 0, so that the last step's variance is above 0. Raises ValueError for a scheduler that thresholds or for
    an unknown prediction type.
    """
    config = scheduler.config
    if config.thresholding:
        raise ValueError("a scheduler with thresholding=True has no Gaussian transition: set it to False")
    sample, output = sample.float(), noise_pred.float()
    timesteps = timesteps.to(sample.device)  # no copy where the scheduler's timesteps are on the device already
    previous = (timesteps - config.num_train_timesteps // scheduler.num_inference_steps).clamp(min=0)
    alphas = scheduler.alphas_cumprod.to(sample.device, torch.float32)
    a, a_prev = (alphas[t].view(-1, 1, 1, 1) for t in (timesteps, previous))
    if config.prediction_type == "epsilon":
        x0, noise = (sample - (1 - a).sqrt() * output) / a.sqrt(), output
    elif config.prediction_type == "sample":
        x0, noise = output, (sample - a.sqrt() * output) / (1 - a).sqrt()
    elif config.prediction_type == "v_prediction":
        x0 = a.sqrt() * sample - (1 - a).sqrt() * output
        noise = a.sqrt() * output + (1 - a).sqrt() * sample
    else:
        raise ValueError(f"unknown prediction_type {config.prediction_type!r}: epsilon, sample or v_prediction")
    if config.clip_sample:
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    variance = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
    sigma = eta * variance.sqrt()
    mean = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).clamp(min=0).sqrt() * noise
    return mean, sigma


def ddim_step_with_logprob(scheduler, noise_pred, timesteps, sample, eta, prev_sample=None, generator=None):
    """Sample x_prev (or take the given one) and score it: -> (prev_sample (B, C, H, W), log_prob (B,) float32).

    A drawn prev_sample has the sample's dtype, and its log-probability is that of the rounded value, so that a later
    pass over what was stored gives the same number. generator: a torch Generator on the sample's device. Raises
    ValueError for eta <= 0, where the transition has no density.
    """
    if eta <= 0:
        raise ValueError(f"eta must be above 0 for a log-probability, not {eta}")
    mean, sigma = transition(scheduler, noise_pred, timesteps, sample, eta)
    if prev_sample is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        prev_sample = (mean + sigma * noise).to(sample.dtype)
    return prev_sample, gaussian.log_prob(prev_sample, mean, sigma)


@dataclasses.dataclass(frozen=True)
class DDIM:
    """The kernel of a DDIM model: its transitions by step index, 0 (pure noise) to T-1."""

    scheduler: object  # a DDIMScheduler after set_timesteps(T)
    eta: float
    random_from: int = 0  # the first step with noise; those before it are the ODE's

    @property
    def initial_sigma(self):
        """Standard deviation of x_T."""
        return self.scheduler.init_noise_sigma

    def time(self, step):
        """What the denoiser is told at the steps (B,): training timesteps (B,)."""
        return self.scheduler.timesteps[step]

    def transition(self, prediction, step, latents):
        """Mean (B, C, H, W) and σ (B, 1, 1, 1), float32, of the steps (B,) from latents with their predictions."""
        eta = self.eta * (step >= self.random_from).to(latents.device).view(-1, 1, 1, 1)
        return transition(self.scheduler, prediction, self.time(step), latents, eta)

    def gain(self, step):
        """By how many standard deviations σ a unit change of the model's output moves the mean, at a step: a number."""
        device = self.scheduler.timesteps.device
        none, small = torch.zeros(1, 1, 1, 1, device=device), 1e-3  # small: a scheduler that clips x0 leaves it alone
        mean, sigma = self.transition(none + small, torch.tensor([step], device=device), none)
        return (mean / sigma / small).abs().item()
