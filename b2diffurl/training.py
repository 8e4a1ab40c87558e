"""The policy update: batched (sample, step) pairs, exact gradient accumulation, one optimiser step an update."""

import dataclasses

import torch

from .ddim import gaussian_log_prob, transition
from .guidance import guided_noise
from .losses import ddpo_is


@dataclasses.dataclass
class Pairs:
    """n selected trajectories of s steps, on the training device; a pair is (trajectory, step)."""

    latents: torch.Tensor  # (n, s + 1, C, H, W): x before the first step, then after each
    log_probs: torch.Tensor  # (n, s) of the policy that sampled
    timesteps: torch.Tensor  # (s,)
    advantages: torch.Tensor  # (n,)
    embeds: torch.Tensor  # (n, L, D)
    negative_embeds: torch.Tensor  # (1, L, D)


def split_updates(order, trajectories_per_update):
    """Cut an epoch's shuffled sample indices into the fewest updates of at most that many, of even size.

    With 130 samples and 128 an update: 65 and 65.
    Every sample is in exactly one update of its epoch: no remainder is dropped, carried over or given an update of its
    own that is much smaller than the others.
    """
    count = -(-len(order) // trajectories_per_update)
    return [chunk for chunk in torch.tensor_split(order, count) if len(chunk)] if count else []


def pair_loss(unet, scheduler, pairs, rows, steps, guidance_scale, eta, clip_range):
    """The loss (B,) of the pairs (rows[b], steps[b]) under the current LoRA, and its statistics (B,)."""
    latents, following = pairs.latents[rows, steps], pairs.latents[rows, steps + 1]
    timesteps = pairs.timesteps[steps]
    negative = pairs.negative_embeds.expand(len(rows), -1, -1)
    predicted = guided_noise(unet, latents, timesteps, pairs.embeds[rows], negative, guidance_scale)
    mean, sigma = transition(scheduler, predicted, timesteps, latents, eta)
    log_prob = gaussian_log_prob(following, mean, sigma)
    return ddpo_is(log_prob, pairs.log_probs[rows, steps], pairs.advantages[rows], clip_range)


def loss_scale(unet, pairs, count):
    """Factor for the backward pass of an update of `count` pairs: 1, or large where the UNet computes in float16.

    A pair's log-probability is a mean over C·H·W and the loss one over the pairs: at SD's size their product puts the
    gradient at the UNet's output below float16's smallest number. The factor takes both out, but for headroom.
    """
    return count * pairs.latents[0, 0].numel() / 8 if unet.dtype == torch.float16 else 1.0


def accumulate(unet, scheduler, pairs, chosen, batch_size, guidance_scale, eta, clip_range, generator, scale=1.0):
    """Put the gradient of the mean loss over all steps of the chosen trajectories into the LoRA; -> statistics.

    The pairs are shuffled over trajectories and steps and cut into UNet batches; each batch's sum is divided by the
    number of pairs in the whole update, so that the gradient is that of a one-by-one loop, whatever batch_size is.
    scale: of the backward pass, taken out of the gradients at its end. Statistics: {name: (pairs,)}.
    """
    length = len(pairs.timesteps)
    order = torch.randperm(len(chosen) * length, generator=generator).to(pairs.latents.device)
    chosen = chosen.to(order.device)
    collected = {}
    for part in order.split(batch_size):
        rows, steps = chosen[part // length], part % length
        loss, statistics = pair_loss(unet, scheduler, pairs, rows, steps, guidance_scale, eta, clip_range)
        (loss.sum() * (scale / len(order))).backward()
        for name, value in {"loss": loss.detach(), **statistics}.items():
            collected.setdefault(name, []).append(value)
    for parameter in unet.parameters():
        if parameter.grad is not None:
            parameter.grad /= scale
    return {name: torch.cat(parts) for name, parts in collected.items()}


def train_epochs(unet, scheduler, optimizer, parameters, pairs, config, generator, on_update):
    """Run config.train.num_epochs over the pairs; on_update(statistics, gradient norm) after every optimiser step.

    An update that overflows in float16 is repeated at a smaller loss scale. Raises FloatingPointError before any other
    non-finite gradient reaches the weights.
    """
    headroom = 1.0
    for _ in range(config.train.num_epochs):
        order = torch.randperm(len(pairs.advantages), generator=generator)
        for chosen in split_updates(order, config.train.trajectories_per_update):
            while True:
                scale = max(1.0, headroom * loss_scale(unet, pairs, len(chosen) * len(pairs.timesteps)))
                statistics = accumulate(
                    unet, scheduler, pairs, chosen, config.train.batch_size,
                    config.sample.guidance_scale, config.sample.eta, config.train.clip_range, generator, scale,
                )  # fmt: skip
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
                if torch.isfinite(norm):
                    break
                if scale == 1:
                    raise FloatingPointError("the gradient is not finite")
                headroom /= 16
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            on_update(statistics, norm.item())
