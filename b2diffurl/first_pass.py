"""Before a stage's first update: does training find the densities that sampling stored? (docs/precision.md)"""

import torch

from .losses import ALGORITHMS


class PolicyMismatch(ValueError):
    """The first pass over a stage's samples does not find the densities that sampling stored."""


LOG_PROB_ROUNDING = 1e-6  # of a log-probability per dimension, which is 1 to 4: four units in float32's last place
MOST_CLIPPED = 0.05  # of a first update's transitions: so many gradients may rounding alone take away
ROUNDING = {  # the most that kernels, batch sizes and devices may move a guided prediction, in its standard deviations
    "no": 1e-4,
    "tf32": 0.05,
    "fp16": 0.1,
    "bf16": 0.5,
}  # about 7 times (no: 14) what another order of every layer's sums does at the worst step (docs/precision.md)


def precision_of(denoiser):
    """The key of ROUNDING in which a denoiser computes: "tf32" where float32 products are made of it."""
    if denoiser.dtype == torch.float32:
        return "tf32" if denoiser.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "no"
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}[denoiser.dtype]


def prediction_error(log_ratios, gain, dimensions):
    """How far, in its standard deviations, the prediction is off the one that sampled: a scalar, float64.

    log_ratios: of transitions of one step, averaged over the latent's D dimensions. A prediction that is off by r at
    random shifts the mean by g r standard deviations σ, g being the kernel's gain; so a log-ratio is Gaussian with
    mean -(g r)²/2 and variance (g r)²/D, and its second moment gives r, whatever the step and the size of the latent.
    What rounding the stored log-probability leaves by itself is taken off: divided by g/√D it would pass for an r.
    """
    moment = (log_ratios.double().square().mean() - LOG_PROB_ROUNDING**2).clamp(min=0)
    shift = 2 * ((dimensions**-2 + moment).sqrt() - 1 / dimensions)
    return (shift.sqrt() / gain).item()


def check_first_pass(statistics, policy, dimensions, train):
    """Raise PolicyMismatch if the first update's densities are not those that were stored, or are no use to it.

    -> the largest prediction error of a step. statistics: of update.accumulate, before any update; dimensions: of a
    latent; train: config.train. Judged by step, over all its transitions, since a single one's ratio says little: the
    prediction may be off by rounding alone, and its clip may take away few gradients by that.
    """
    scale = dimensions if train.log_prob == "sum" else 1
    steps, precision = statistics["step"], precision_of(policy.denoiser)
    # of a value that another policy drew, as D-Fusion's targets are, the ratio moves by so much more
    log_ratios = statistics["ratio"].double().log() / scale / statistics["residual"].clamp(min=1)
    distinct = steps.unique().tolist()
    errors = {k: prediction_error(log_ratios[steps == k], policy.kernel.gain(k), dimensions) for k in distinct}
    worst = max(errors, key=errors.get)
    if not errors[worst] <= ROUNDING[precision]:
        raise PolicyMismatch(
            f"at t={int(policy.kernel.time(worst))} the prediction is off the one that sampled by {errors[worst]:.2g} "
            f"standard deviations, where rounding explains {ROUNDING[precision]:g}: the samples are not this policy's. "
            "Delete the stage's folder and run all its steps again, in one precision and on one kind of device"
        )
    clipped = statistics["clipped"]
    if clipped.mean() > MOST_CLIPPED:
        by_step = {k: clipped[steps == k].mean().item() for k in distinct}
        most = max(by_step, key=by_step.get)
        name = "dpo_clip_range" if ALGORITHMS[train.algorithm].preference else "clip_range"
        raise PolicyMismatch(
            f"rounding alone takes {clipped.mean():.0%} of the first update's ratios beyond "
            f"config.train.{name}={getattr(train, name):g}, {by_step[most]:.0%} at t={int(policy.kernel.time(most))}. "
            "Give a larger one, or config.mixed_precision=no with config.allow_tf32=False"
        )
    return errors[worst]
