"""A stage's experience without a stage, and how far the densities of its first pass are off those of its sampling."""

import dataclasses

import torch

from ..errors import UserError
from ..experience import Experience
from ..first_pass import ROUNDING, precision_of, prediction_error
from ..guidance import take, to_device
from ..plan import Plan
from ..rollout import Rollout, assemble, denoise
from ..run.processes import device
from ..run.prompts import read_prompts
from ..update import losses_of


def sampled(loaded, checkpoint, images, steps):
    """Sample images together, over a whole schedule of `steps` trained steps -> the Policy, and an Experience of them.

    Raises UserError where a latent is not finite.
    """
    config, plan = loaded.config, Plan(steps, 0, images)
    kernel = loaded.family.kernel(steps + loaded.family.untrained, config.sample)
    policy = dataclasses.replace(loaded.policy(checkpoint), kernel=kernel)
    cond = to_device(loaded.family.embed([read_prompts(config.prompts.train)[0]]), device())
    noise = torch.randn(images, steps + 1, *loaded.family.latent_shape).to(device())
    path, log_probs = denoise(policy, policy.initial(noise[:, 0]), take(cond, [0] * images), noise[:, 1:], range(steps))
    log_prob = torch.stack(log_probs, 1).flatten()
    if not log_prob.isfinite().all():
        raise UserError(f"config.mixed_precision={config.mixed_precision!r}: the latents are not finite")
    forest = assemble(plan, torch.stack(path, 1).flatten(0, 1)[None], log_prob[None], torch.zeros(1, dtype=torch.long))
    sample = torch.arange(images).repeat_interleave(steps)
    advantage = (1.0 - 2 * (sample % 2)).to(device())
    return policy, Experience(forest, cond, torch.arange(len(sample)), advantage, sample)


def repeated(experience, count):
    """An experience of one transition, `count` times beside each other: of as many states, samples and rows."""
    one, rows = experience.rollout, torch.arange(count)
    rollout = Rollout(
        states=one.states.repeat(count, *[1] * (one.states.ndim - 1)), before=2 * rows, after=2 * rows + 1,
        step=one.step.repeat(count), log_prob=one.log_prob.repeat(count), prompt=one.prompt.repeat(count),
    )  # fmt: skip
    return Experience(rollout, experience.cond, rows, experience.advantage.repeat(count), rows)


def first_pass(loaded, checkpoint, images, steps, batch):
    """How far the densities of training are off those of sampling, by step, before any update -> figures.

    As in a stage: the images are sampled together, over a whole schedule of `steps` steps; then their transitions are
    read in shuffled order, `batch` per call, with gradients. Batch sizes and gradients make other kernels compute, and
    their rounding is what is seen.
    """
    policy, experience = sampled(loaded, checkpoint, images, steps)
    trained = dataclasses.replace(loaded.trainable(checkpoint)[0], kernel=policy.kernel)
    train = loaded.config.copy_and_resolve_references().train
    train.algorithm, train.log_prob = "ddpo_is", "mean"
    log_ratios = torch.empty(images * steps, dtype=torch.float64)
    for rows in torch.randperm(len(log_ratios)).split(batch):
        statistics = losses_of(trained, experience, rows, train)[1]
        log_ratios[rows] = statistics["ratio"].double().log().cpu()
    by_step = []
    for step, own in enumerate(log_ratios.view(images, steps).T):
        row = {"t": int(policy.kernel.time(step)), "ratio_error": own.expm1().abs().max().item()}
        if loaded.config.train.log_prob == "sum":
            row["ratio_error_of_sum"] = (own * experience.dimensions).expm1().abs().max().item()
        error = prediction_error(own, policy.kernel.gain(step), experience.dimensions)
        by_step.append(row | {"prediction_error": error})
    figures = {"images": images, "steps": steps, "steps_of_run": loaded.config.sample.num_steps, "per_call": batch}
    return figures | {"allowed": ROUNDING[precision_of(policy.denoiser)], "by_step": by_step}


def affordable(config, sampling, batch, seconds):
    """(images, steps, transitions per call) for first_pass: the run's, or what can be walked and read in that time.

    sampling: its figures. batch: of training; another one where it is the number of images: calls of the same size
    round alike on a CPU, so that there would be nothing to see.
    """
    walked = int(seconds / (2 * sampling["seconds_per_step"]))
    steps = max(1, min(config.sample.num_steps, walked // 2))
    images = max(2, min(sampling["batch"], walked // steps))
    return images, steps, batch if batch != images else images // 2


def first_pass_lines(figures):
    """first_pass's figures as text: the three steps whose prediction is furthest off."""
    fewer = "" if figures["steps"] == figures["steps_of_run"] else f" (a run has {figures['steps_of_run']})"
    lines = [
        f"first pass: {figures['images']} images sampled together in {figures['steps']} steps{fewer}, read again "
        f"{figures['per_call']} per call; the prediction may be off by {figures['allowed']:g} standard deviations"
    ]
    for row in sorted(figures["by_step"], key=lambda row: -row["prediction_error"])[:3]:
        line = f"  t={row['t']}: the prediction is off by {row['prediction_error']:.1e}, |ratio - 1| at most "
        lines.append(line + f"{row['ratio_error']:.1e}")
        if "ratio_error_of_sum" in row:
            lines[-1] += f", {row['ratio_error_of_sum']:.1e} with the preset's log_prob=sum"
    return lines
