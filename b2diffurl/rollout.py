"""Branch-based sampling (paper section 4.2): a stage's groups, denoised along the forest that their plan is.

The denoiser is asked once for every state, however many transitions leave it: the branches of a group share the
prediction at the fork.
"""

import dataclasses

import torch

from . import gaussian
from .ahead import ahead
from .guidance import take
from .noise import stream_noise


@dataclasses.dataclass
class Rollout:
    """M trained transitions between S states, every latent once: made by sampling, held by a file, read by updates."""

    states: torch.Tensor  # (S, ...) latents
    before: torch.Tensor  # (M,) the state that a transition leaves
    after: torch.Tensor  # (M,) the state that it leads to
    step: torch.Tensor  # (M,) the denoising step that it is
    log_prob: torch.Tensor  # (M,) float32, averaged over the dimensions, under the policy that sampled
    prompt: torch.Tensor  # (M,) row of the Conditioning that it was sampled with

    def to(self, device):
        """The same with its numbers on a device; what they are indexed by stays where it is."""
        return dataclasses.replace(self, states=self.states.to(device), log_prob=self.log_prob.to(device))


def assemble(plan, states, log_prob, prompt):
    """The Rollout of G groups: states (G, plan.states, ...), log_prob (G, M/G) and prompt (G,) of each group."""
    table, groups = plan.transitions, len(states)
    first = torch.arange(groups)[:, None] * plan.states
    return Rollout(
        states=states.flatten(0, 1),
        before=(first + torch.from_numpy(table.before)).flatten(),
        after=(first + torch.from_numpy(table.after)).flatten(),
        step=torch.from_numpy(table.step).repeat(groups),
        log_prob=log_prob.flatten(),
        prompt=prompt.repeat_interleave(len(table.step)),
    )


@torch.no_grad()
def denoise(policy, latents, cond, noise, steps):
    """Take the steps from latents (B, ...) with noise (B, len(steps), ...).

    -> the state before the first and after each step [(B, ...)], and log-probabilities [(B,)]. Latents keep their
    dtype; the log-probability is that of the rounded latent.
    """
    states, log_probs = [latents], []
    for i, step in enumerate(steps):
        index = torch.full((len(latents),), step, device=latents.device)
        mean, sigma = policy.transition(states[-1], index, cond)
        states.append((mean + sigma * noise[:, i]).to(latents.dtype))
        log_probs.append(gaussian.log_prob(states[-1], mean, sigma))
    return states, log_probs


@torch.no_grad()
def sample(policy, plan, cond, seeds, batch_size, on_batch):
    """Denoise G groups along the plan -> states (G, plan.states, ...) and log-probabilities (G, M/G), on the CPU.

    cond: Conditioning (G, ...). seeds: for every level those of its G·nodes noise streams. Nodes of any groups share
    calls of the denoiser, batch_size of them per call. on_batch(first, final) gets the finished latents (B, ...) of the
    images first….
    """
    states, log_probs, forks = [], [], None
    for level, own in enumerate(plan.levels):
        noise = _noise(policy, seeds[level], own.last - own.first + 1, batch_size)
        latents, trained, ends = [], [], []
        for first, path, densities, ended in _walk(policy, own, cond, noise, forks):
            if own.last == plan.steps:
                on_batch(first, path[-1])
            else:
                ends.append(ended())
            latents.append(_last(path, plan.stored(level), plan.left_out(level)))
            trained.append(_last(densities, plan.trained(level), plan.left_out(level)))
        states += [latents] if plan.stored(level) else []
        log_probs += [trained] if plan.trained(level) else []
        forks = [torch.cat(own) for own in zip(*ends, strict=True)]
    if policy.device.type == "cuda":
        torch.cuda.synchronize()  # before anything that was copied without waiting is read
    groups = len(seeds[0]) // plan.roots
    states, log_probs = (torch.cat([_by_group(own, groups) for own in levels], 1) for levels in (states, log_probs))
    return states, log_probs


def _by_group(batches, groups):
    """A level's batches [(B, count, ...)], nodes in order -> (G, nodes · count, ...)."""
    return torch.cat(batches).unflatten(0, (groups, -1)).flatten(1, 2)


def _walk(policy, level, cond, batches, forks):
    """Denoise a level's nodes, batch by batch.

    -> number of the first node, [states (B, ...)] at the level's times, [log-probabilities (B,)] of the steps to them,
    and a function to ask for mean and σ of the step at the fork where the level ends. forks: mean and σ of the fork
    from which the level's first states are drawn, of all nodes above; empty at the roots.
    """
    for first, noise in batches:
        nodes = torch.arange(first, first + len(noise), device=policy.device)
        given, noise, densities = take(cond, nodes // level.nodes), noise.to(policy.device, non_blocking=True), []
        if forks:
            mean, sigma = (of_fork[nodes // level.fan_out] for of_fork in forks)
            latents = (mean + sigma * noise[:, 0]).to(policy.latent_dtype)
            densities.append(gaussian.log_prob(latents, mean, sigma))
        else:
            latents = policy.initial(noise[:, 0])
        path, walked = denoise(policy, latents, given, noise[:, 1:], range(level.first, level.last))

        def end(latents=path[-1], given=given):
            return policy.transition(latents, torch.full((len(latents),), level.last, device=policy.device), given)

        yield first, path, densities + walked, end


def _last(tensors, count, left_out):
    """`count` of a batch's tensors [(B, ...)], the last but for those left out -> (B, count, ...), on the CPU."""
    chosen = tensors[: len(tensors) - left_out][-count:]
    return torch.stack(chosen, 1).to("cpu", non_blocking=True) if count else None


def _noise(policy, seeds, draws, batch_size):
    """(first node, noise (B, draws, ...)) of every batch; the next one is drawn while the last is used."""

    def draw(first):
        shape = policy.family.latent_shape
        noise = torch.stack([stream_noise(seed, draws, shape) for seed in seeds[first : first + batch_size]])
        return first, noise.pin_memory() if policy.device.type == "cuda" else noise

    return ahead(draw, range(0, len(seeds), batch_size))
