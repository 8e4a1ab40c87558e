"""The policy update: exact gradient accumulation over transitions, one optimiser step per update.

`train` is config.train everywhere; nothing else of the configuration is read.
"""

import dataclasses

import torch

from . import gaussian
from .average import Average
from .experience import rows_of
from .first_pass import check_first_pass
from .guidance import take
from .losses import ALGORITHMS, Terms, refers_to_base
from .policy import Policy
from .run import processes


@dataclasses.dataclass
class Learner:
    """What an update changes."""

    policy: Policy
    optimizer: torch.optim.Optimizer  # over the LoRA alone
    headroom: float = 1.0  # of the loss scale: falls where an update overflows in float16
    average: Average | None = None  # of the LoRA over the updates

    @property
    def parameters(self):
        """The LoRA's, in the optimiser's order."""
        return self.optimizer.param_groups[0]["params"]


def split_updates(order, size):
    """Cut an epoch's shuffled sample indices into the fewest updates of at most `size`, of even size.

    With 130 samples and 128 per update: 65 and 65. Every sample is in exactly one update of its epoch: no remainder is
    dropped, carried over or given an update of its own that is much smaller than the others.
    """
    count = -(-len(order) // size)
    return [chunk for chunk in torch.tensor_split(order, count) if len(chunk)] if count else []


def update_size(train):
    """Most samples per update: trajectories_per_update; a preference is a sample of two trajectories."""
    return max(1, train.trajectories_per_update // (2 if ALGORITHMS[train.algorithm].preference else 1))


def count_updates(train, samples):
    """{train.accumulate_over: how many updates a stage with so many samples has under it}."""
    if ALGORITHMS[train.algorithm].on_policy or not samples:
        return dict.fromkeys(("epoch", "stage"), min(1, samples))
    size, epochs = update_size(train), train.num_epochs
    return {"epoch": epochs * -(-samples // size), "stage": epochs * samples // size}


def cut_updates(train, samples, generator):
    """The stage's updates, in order: [indices of the samples whose mean gradient makes an update].

    train.accumulate_over: "epoch" cuts every shuffled epoch by itself, with split_updates. "stage" is the authors'
    accumulation: always update_size samples, which runs on from epoch to epoch, and what is left at the stage's end is
    dropped; so a stage with few samples can have no update at all. On-policy algorithms make one update of everything.
    """
    if ALGORITHMS[train.algorithm].on_policy:
        return [torch.arange(samples)]
    orders, size = [torch.randperm(samples, generator=generator) for _ in range(train.num_epochs)], update_size(train)
    if train.accumulate_over == "epoch":
        return [chosen for order in orders for chosen in split_updates(order, size)]
    return [chosen for chosen in torch.cat(orders).split(size) if len(chosen) == size]


def transitions_of(policy, experience, rows):
    """Mean and σ of the rollout's transitions `rows` (B,) under the policy, and how many states were asked about.

    Each state is asked about once, however many of the transitions leave it.
    """
    rollout, first, before = experience.rollout, {}, experience.rollout.before[rows].tolist()
    for place, state in enumerate(before):
        first.setdefault(state, place)
    asked = rows[[*first.values()]]
    given = take(experience.cond, rollout.prompt[asked])
    mean, sigma = policy.transition(rollout.states[rollout.before[asked]], rollout.step[asked], given)
    if len(asked) < len(rows):
        place = {state: place for place, state in enumerate(first)}
        again = [place[state] for state in before]
        mean, sigma = mean[again], sigma[again]
    return mean, sigma, len(asked)


@torch.no_grad()
def pretrained_means(policy, experience, batch_size):
    """Means (n, ...) of the experience's transitions under the base model, and how many states were asked about."""
    means = experience.rollout.states.new_zeros(len(experience.row), *experience.rollout.states.shape[1:]).float()
    states, asked = rows_of(experience, torch.arange(experience.samples)), 0
    mine = states[processes.share(len(states))]
    with policy.pretrained(), policy.together():
        for first in range(0, len(mine), batch_size):
            chosen = torch.tensor([row for state in mine[first : first + batch_size] for row in state])
            means[chosen], _, evaluated = transitions_of(policy, experience, experience.row[chosen])
            asked += evaluated
    processes.sum_([means])
    return means, sum(processes.gather(asked))


def ask_pretrained(policy, experience, train):
    """Put the base model's means into the experience, where the algorithm needs them -> how many states it asked."""
    asked = 0
    if ALGORITHMS[train.algorithm].pretrained or refers_to_base(train):
        experience.pretrained_mean, asked = pretrained_means(policy, experience, train.batch_size)
    if refers_to_base(train):
        losers = dataclasses.replace(experience, row=experience.rival, rival=None)
        experience.rival_pretrained_mean, more = pretrained_means(policy, losers, train.batch_size)
        asked += more
    return asked


def losses_of(policy, experience, chosen, train):
    """Losses (B,) of the experience's rows `chosen` under the policy, their statistics (B,), and states asked about."""
    rollout, rows = experience.rollout, experience.row[chosen]
    if experience.rival is not None:
        rows = torch.cat([rows, experience.rival[chosen]])
    mean, sigma, states = transitions_of(policy, experience, rows)
    dimensions = experience.dimensions if train.log_prob == "sum" else 1
    log_prob = gaussian.log_prob(rollout.states[rollout.after[rows]], mean, sigma) * dimensions
    old, kl, rival, base, count = rollout.log_prob[rows] * dimensions, None, None, None, len(chosen)
    advantage = experience.advantage[chosen]
    if experience.baseline is not None:
        advantage = advantage - experience.baseline[chosen]
    if experience.rival_pretrained_mean is not None:
        means = torch.cat([experience.pretrained_mean[chosen], experience.rival_pretrained_mean[chosen]])
        ratio = log_prob - gaussian.log_prob(rollout.states[rollout.after[rows]], means, sigma) * dimensions
        base = ratio[:count], ratio[count:]
    elif experience.pretrained_mean is not None:
        kl = gaussian.kl(mean, experience.pretrained_mean[chosen], sigma) * dimensions
    if experience.rival is not None:
        rival = (log_prob - old)[count:]
    terms = Terms(log_prob[:count], old[:count], advantage, rival, kl, base)
    loss, statistics = ALGORITHMS[train.algorithm].loss(terms, train)
    away = gaussian.residual((log_prob / dimensions).detach(), sigma)
    statistics["residual"] = away[:count].maximum(away[count:]) if experience.rival is not None else away
    return loss if experience.weight is None else loss * experience.weight[chosen], statistics, states


def loss_scale(policy, experience, count, train):
    """Factor for the backward pass of an update of `count` transitions: 1, or large where float16 computes.

    A transition's log-probability is a mean over the latent and the loss one over the transitions: at SD's size their
    product puts the gradient at the denoiser's output below float16's smallest number. The factor takes both out, but
    for headroom.
    """
    dimensions = 1 if train.log_prob == "sum" else experience.dimensions
    return count * dimensions / 8 if policy.denoiser.dtype == torch.float16 else 1.0


def accumulate(learner, experience, samples, train, generator, scale=1.0):
    """Put the gradient of the mean loss over all transitions of the samples into the LoRA.

    The transitions are shuffled over samples and steps, those of one state together, shared among the processes and cut
    into calls; each call's sum is divided by the number of transitions in the whole update and the processes' gradients
    are added, so that the gradient is that of a one-by-one loop, whatever train.batch_size and the number of processes,
    but for rounding. scale: of the backward pass, taken out of the gradients at its end.
    -> statistics {name: (transitions,)}, their step among them, and how many states the denoiser was asked about.
    """
    collected, asked = {}, 0
    states = rows_of(experience, samples)
    order = torch.randperm(len(states), generator=generator)
    count, per_call = sum(map(len, states)), max(1, train.batch_size // (1 if experience.rival is None else 2))
    mine = order[processes.share(len(order))]
    with learner.policy.together(backward=True):
        for call in mine.split(per_call) if len(mine) else ():
            chosen = torch.tensor([row for state in call.tolist() for row in states[state]])
            loss, statistics, evaluated = losses_of(learner.policy, experience, chosen, train)
            (loss.sum() * (scale / count)).backward()
            asked += evaluated
            step = experience.rollout.step[experience.row[chosen]]
            for name, value in {"loss": loss.detach(), "step": step, **statistics}.items():
                collected.setdefault(name, []).append(value)
    for parameter in learner.parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / scale
    processes.sum_([parameter.grad for parameter in learner.parameters])
    own = {name: torch.cat(found).cpu() for name, found in collected.items()}
    found = processes.gather((own, asked))
    names = next(own for own, _ in found if own)
    return {name: torch.cat([own[name] for own, _ in found if own]) for name in names}, sum(n for _, n in found)


def train_updates(learner, experience, train, generator, on_update):
    """Run the stage's updates; on_update(statistics, gradient norm) after every optimiser step.

    -> how many states the denoiser was asked about, those of repeated and of refused updates included. An update that
    overflows in float16 is repeated with a sixteenth of the learner's headroom. Raises FloatingPointError before any
    other non-finite gradient reaches the weights. Where train.target_kl is above 0, the stage ends before the first
    update that finds the mean approx_kl above it; the first update, which only rounding keeps from 0, is always made.
    Raises PolicyMismatch before the first update: see first_pass.py.
    """
    asked, optimizer = 0, learner.optimizer
    for made, samples in enumerate(cut_updates(train, experience.samples, generator)):
        count = int(experience.sizes[samples].sum())
        while True:
            scale = max(1.0, learner.headroom * loss_scale(learner.policy, experience, count, train))
            statistics, evaluated = accumulate(learner, experience, samples, train, generator, scale)
            asked += evaluated
            norm = torch.nn.utils.clip_grad_norm_(learner.parameters, train.max_grad_norm)
            if torch.isfinite(norm):
                break
            if scale == 1:
                raise FloatingPointError("the gradient is not finite")
            learner.headroom /= 16
            optimizer.zero_grad()
        if not made:
            error = check_first_pass(statistics, learner.policy, experience.dimensions, train)
            statistics["prediction_error"] = torch.tensor(error)
        elif 0 < train.target_kl < statistics["approx_kl"].mean():
            optimizer.zero_grad()
            break
        optimizer.step()
        optimizer.zero_grad()
        if learner.average:
            learner.average.step()
        del statistics["step"], statistics["residual"]
        on_update(statistics, norm.item())
    return asked


def build_optimizer(train, parameters, left=1.0):
    """AdamW over the LoRA's parameters, {name: float32 parameter}; left: the learning rate's share that is left."""
    return torch.optim.AdamW(
        parameters.values(),
        lr=train.learning_rate * left,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.adam_weight_decay,
    )
