"""The policy update: batched (sample, step) pairs, exact gradient accumulation, one optimiser step an update."""

import dataclasses

import torch

from .ddim import gaussian_log_prob, prediction_gain, transition
from .guidance import guided_noise
from .losses import ddpo_is, ddpo_sf, dpo, dpok, gaussian_kl
from .run import processes


@dataclasses.dataclass
class Pairs:
    """n selected trajectories of s steps, on the training device; a pair is (trajectory, step).

    For dpo the first n/2 trajectories are the winners, and trajectory i + n/2 is the loser that i is compared with.
    """

    latents: torch.Tensor  # (n, s + 1, C, H, W): x before the first step, then after each
    log_probs: torch.Tensor  # (n, s) of the policy that sampled
    timesteps: torch.Tensor  # (s,)
    advantages: torch.Tensor  # (n,)
    embeds: torch.Tensor  # (n, L, D)
    negative_embeds: torch.Tensor  # (1, L, D)
    pretrained_means: torch.Tensor | None = None  # (n, s, C, H, W) of the base model's transitions, for dpok
    baselines: torch.Tensor | None = None  # (n, s) to subtract from the advantages, for dpok


def split_updates(order, trajectories_per_update):
    """Cut an epoch's shuffled sample indices into the fewest updates of at most that many, of even size.

    With 130 samples and 128 an update: 65 and 65.
    Every sample is in exactly one update of its epoch: no remainder is dropped, carried over or given an update of its
    own that is much smaller than the others.
    """
    count = -(-len(order) // trajectories_per_update)
    return [chunk for chunk in torch.tensor_split(order, count) if len(chunk)] if count else []


def update_size(config, count):
    """(samples, most samples an update) of a stage with `count` selected trajectories.

    A sample is a trajectory; for dpo it is a winner with its loser, two trajectories.
    """
    per_update = config.train.trajectories_per_update
    return (count // 2, max(1, per_update // 2)) if config.train.algorithm == "dpo" else (count, per_update)


def count_updates(config, count):
    """{config.train.accumulate_over: how many updates the stage has under it}."""
    samples, per_update = update_size(config, count)
    epochs = config.train.num_epochs
    if config.train.algorithm == "ddpo_sf":
        return {"epoch": 1, "stage": 1}
    return {"epoch": epochs * -(-samples // per_update), "stage": epochs * samples // per_update}


def plan_updates(config, count, generator):
    """The stage's updates, in order: [indices of the samples whose mean gradient makes an update].

    config.train.accumulate_over: "epoch" cuts every shuffled epoch by itself, with split_updates. "stage" is the
    authors' accumulation: always trajectories_per_update samples, which runs on from epoch to epoch, and what is left
    at the stage's end is dropped; so a stage with few samples can have no update at all. ddpo_sf makes one update of
    everything, once: after it the samples are no longer the policy's own.
    """
    samples, per_update = update_size(config, count)
    if config.train.algorithm == "ddpo_sf":
        return [torch.arange(samples)]
    orders = [torch.randperm(samples, generator=generator) for _ in range(config.train.num_epochs)]
    if config.train.accumulate_over == "epoch":
        return [chosen for order in orders for chosen in split_updates(order, per_update)]
    return [chosen for chosen in torch.cat(orders).split(per_update) if len(chosen) == per_update]


def step_distribution(unet, scheduler, pairs, rows, steps, config):
    """Mean (B, C, H, W) and σ (B, 1, 1, 1) of the transitions (rows[b], steps[b]) under the UNet as it is."""
    latents, timesteps = pairs.latents[rows, steps], pairs.timesteps[steps]
    negative = pairs.negative_embeds.expand(len(rows), -1, -1)
    predicted = guided_noise(unet, latents, timesteps, pairs.embeds[rows], negative, config.sample.guidance_scale)
    return transition(scheduler, predicted, timesteps, latents, config.sample.eta)


@torch.no_grad()
def pretrained_means(unet, scheduler, pairs, config):
    """The base model's transition means (n, s, C, H, W) at the pairs' latents: the UNet without its LoRA."""
    count, length = pairs.log_probs.shape
    means = torch.zeros_like(pairs.latents[:, 1:], dtype=torch.float32)
    unet.disable_adapters()
    mine = torch.arange(count * length, device=means.device)[processes.part(count * length)]
    for part in mine.split(config.train.batch_size) if len(mine) else ():
        rows, steps = part // length, part % length
        means[rows, steps] = step_distribution(unet, scheduler, pairs, rows, steps, config)[0]
    unet.enable_adapters()
    processes.sum_([means])
    return means


def pair_loss(unet, scheduler, pairs, rows, steps, config):
    """The loss (B,) of the pairs (rows[b], steps[b]) under the current LoRA, and its statistics (B,)."""
    train = config.train
    if train.algorithm == "dpo":
        rows, steps = torch.cat([rows, rows + len(pairs.latents) // 2]), torch.cat([steps, steps])
    following = pairs.latents[rows, steps + 1]
    mean, sigma = step_distribution(unet, scheduler, pairs, rows, steps, config)
    dimensions = following[0].numel() if train.log_prob == "sum" else 1
    log_prob = gaussian_log_prob(following, mean, sigma) * dimensions
    old, advantages = pairs.log_probs[rows, steps] * dimensions, pairs.advantages[rows]
    if train.algorithm == "ddpo_is":
        return ddpo_is(log_prob, old, advantages, train.clip_range)
    if train.algorithm == "ddpo_sf":
        return ddpo_sf(log_prob, old, advantages)
    if train.algorithm == "dpo":
        return dpo(*(log_prob - old).chunk(2), train.dpo_beta)
    if pairs.baselines is not None:
        advantages = advantages - pairs.baselines[rows, steps]
    kl = gaussian_kl(mean, pairs.pretrained_means[rows, steps], sigma) * dimensions
    return dpok(log_prob, old, advantages, train.clip_range, kl, train.kl_weight)


class PolicyMismatch(ValueError):
    """The first pass over a stage's samples does not find the densities that sampling stored."""


LOG_PROB_ROUNDING = 1e-6  # of a float32 log-probability a dimension, which is 1 to 4: four units in its last place
MOST_CLIPPED = 0.05  # of a first update's transitions: so many gradients may rounding alone take away
ROUNDING = {  # the most that kernels, batch sizes and devices may move a guided prediction, in its standard deviations
    "no": 1e-4,
    "tf32": 0.05,
    "fp16": 0.1,
    "bf16": 0.5,
}  # about 7 times (no: 14) what another order of every layer's sums does at the worst step (docs/precision.md)


def precision_of(config):
    """The key of ROUNDING: config.mixed_precision, or "tf32" where float32 products are made of it."""
    tf32 = config.mixed_precision == "no" and config.allow_tf32 and torch.cuda.is_available()
    return "tf32" if tf32 else config.mixed_precision


def prediction_error(log_ratios, gain, dimensions):
    """How far, in its standard deviations, the prediction is off the one that sampled: a scalar, float64.

    log_ratios: of transitions of one step, averaged over the latent's D dimensions. A prediction that is off by r at
    random shifts the mean by g r standard deviations σ, g being ddim.prediction_gain; so a log-ratio is Gaussian with
    mean -(g r)²/2 and variance (g r)²/D, and its second moment gives r, whatever the step and the size of the latent.
    What rounding the stored log-probability leaves by itself is taken off: divided by g/√D it would pass for an r.
    """
    moment = (log_ratios.double().square().mean() - LOG_PROB_ROUNDING**2).clamp(min=0)
    shift = 2 * ((dimensions**-2 + moment).sqrt() - 1 / dimensions)
    return (shift.sqrt() / gain).item()


def check_first_pass(statistics, steps, timesteps, gains, dimensions, config):
    """Raise PolicyMismatch if the first update's densities are not those that were stored, or are no use to it.

    -> the largest prediction error of a step. statistics: of accumulate, before any update, of transitions (pairs,) at
    the step indices `steps`; timesteps and gains (s,). Judged by step, over all its transitions, since a single one's
    ratio says little: the prediction may be off by rounding alone, and its clip may take away few gradients by that.
    """
    scale = dimensions if config.train.log_prob == "sum" else 1
    log_ratios, precision = statistics["ratio"].double().log() / scale, precision_of(config)
    errors = {
        int(k): prediction_error(log_ratios[steps == k], gains[int(k)].item(), dimensions) for k in steps.unique()
    }
    worst = max(errors, key=errors.get)
    if not errors[worst] <= ROUNDING[precision]:
        raise PolicyMismatch(
            f"at t={int(timesteps[worst])} the prediction is off the one that sampled by {errors[worst]:.2g} standard "
            f"deviations, where rounding explains {ROUNDING[precision]:g}: the samples are not this policy's. Delete "
            "the stage's folder and run all its steps again, in one precision and on one kind of device"
        )
    clipped = statistics["clipped"]
    if clipped.mean() > MOST_CLIPPED:
        by_step = {int(k): clipped[steps == k].mean().item() for k in steps.unique()}
        most = max(by_step, key=by_step.get)
        raise PolicyMismatch(
            f"rounding alone takes {clipped.mean():.0%} of the first update's ratios beyond "
            f"config.train.clip_range={config.train.clip_range:g}, {by_step[most]:.0%} at t={int(timesteps[most])}. "
            "Give a larger one, or config.mixed_precision=no with config.allow_tf32=False"
        )
    return max(errors.values())


def loss_scale(unet, pairs, count, config):
    """Factor for the backward pass of an update of `count` pairs: 1, or large where the UNet computes in float16.

    A pair's log-probability is a mean over C·H·W and the loss one over the pairs: at SD's size their product puts the
    gradient at the UNet's output below float16's smallest number. The factor takes both out, but for headroom.
    """
    dimensions = 1 if config.train.log_prob == "sum" else pairs.latents[0, 0].numel()
    return count * dimensions / 8 if unet.dtype == torch.float16 else 1.0


def accumulate(unet, scheduler, pairs, chosen, config, generator, scale=1.0):
    """Put the gradient of the mean loss over all steps of the chosen samples into the LoRA; -> statistics.

    The pairs are shuffled over samples and steps, shared among the processes and cut into UNet batches; each batch's
    sum is divided by the number of pairs in the whole update and the processes' gradients are added, so that the
    gradient is that of a one-by-one loop, whatever config.train.batch_size and the number of processes, but for
    rounding. scale: of the backward pass, taken out of the gradients at its end. Statistics: {name: (pairs,)}, their
    "step" among them.
    """
    length = len(pairs.timesteps)
    order = torch.randperm(len(chosen) * length, generator=generator).to(pairs.latents.device)
    chosen = chosen.to(order.device)
    collected = {}
    per_call = max(1, config.train.batch_size // (2 if config.train.algorithm == "dpo" else 1))
    mine = order[processes.part(len(order))]
    for part in mine.split(per_call) if len(mine) else ():
        loss, statistics = pair_loss(unet, scheduler, pairs, chosen[part // length], part % length, config)
        (loss.sum() * (scale / len(order))).backward()
        for name, value in {"loss": loss.detach(), "step": part % length, **statistics}.items():
            collected.setdefault(name, []).append(value)
    gradients = []
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / scale
            gradients.append(parameter.grad)
    processes.sum_(gradients)
    found = processes.gather({name: torch.cat(parts).cpu() for name, parts in collected.items()})
    return {name: torch.cat([own[name] for own in found if own]) for name in next(filter(None, found))}


def train_updates(unet, scheduler, optimizer, parameters, pairs, config, generator, on_update, headroom=1.0):
    """Run the stage's updates over the pairs; on_update(statistics, gradient norm) after every optimiser step.

    -> how many transitions went through the UNet, those of repeated and of refused updates included, and the headroom
    of the loss scale, for the next stage. An update that overflows in float16 is repeated with a sixteenth of it.
    Raises FloatingPointError before any other non-finite gradient reaches the weights. Where config.train.target_kl is
    above 0, the stage ends before the first update that finds the mean approx_kl above it; the first update, which only
    rounding keeps from 0, is always made. Raises PolicyMismatch before the first update: see check_first_pass.
    """
    seen, dimensions = 0, pairs.latents[0, 0].numel()
    for made, chosen in enumerate(plan_updates(config, len(pairs.advantages), generator)):
        while True:
            scale = max(1.0, headroom * loss_scale(unet, pairs, len(chosen) * len(pairs.timesteps), config))
            statistics = accumulate(unet, scheduler, pairs, chosen, config, generator, scale)
            steps = statistics.pop("step")
            seen += len(statistics["loss"]) * (2 if config.train.algorithm == "dpo" else 1)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
            if torch.isfinite(norm):
                break
            if scale == 1:
                raise FloatingPointError("the gradient is not finite")
            headroom /= 16
            optimizer.zero_grad()
        if not made:
            gains = prediction_gain(scheduler, pairs.timesteps, config.sample.eta)
            statistics["prediction_error"] = torch.tensor(
                check_first_pass(statistics, steps, pairs.timesteps, gains, dimensions, config)
            )
        elif 0 < config.train.target_kl < statistics["approx_kl"].mean():
            optimizer.zero_grad()
            break
        optimizer.step()
        optimizer.zero_grad()
        on_update(statistics, norm.item())
    return seen, headroom
