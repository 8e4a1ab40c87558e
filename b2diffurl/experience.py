"""What a stage trains on: the transitions of its rollout that have credit, and the credit."""

import dataclasses
import functools

import torch

from .guidance import to_device
from .rollout import Rollout
from .step_weights import step_weights


@dataclasses.dataclass
class Experience:
    """A stage's transitions and their credit, n rows of it.

    Latents and other numbers are on the training device, what they are indexed by on the CPU: calls are cut there.
    """

    rollout: Rollout
    cond: dict  # Conditioning (P, ...), by rollout.prompt
    row: torch.Tensor  # (n,) the transition, and as in credit.Credit:
    advantage: torch.Tensor  # (n,)
    sample: torch.Tensor  # (n,)
    rival: torch.Tensor | None = None  # (n,)
    pretrained_mean: torch.Tensor | None = None  # (n, ...) of the base model's transitions
    rival_pretrained_mean: torch.Tensor | None = None  # (n, ...)
    baseline: torch.Tensor | None = None  # (n,) to subtract from the advantages
    weight: torch.Tensor | None = None  # (n,) by which the losses are multiplied

    def to(self, device):
        """The same with its numbers on a device; what they are indexed by stays where it is."""
        moved = {"cond": to_device(self.cond, device), "rollout": self.rollout.to(device)}
        for name in ("advantage", "pretrained_mean", "rival_pretrained_mean", "baseline", "weight"):
            moved[name] = None if getattr(self, name) is None else getattr(self, name).to(device)
        return dataclasses.replace(self, **moved)

    @functools.cached_property
    def sizes(self):
        """How many rows every sample has (samples,)."""
        return torch.bincount(self.sample)

    @property
    def samples(self):
        """How many samples there are."""
        return len(self.sizes)

    @property
    def dimensions(self):
        """How many numbers a latent has."""
        return self.rollout.states[0].numel()


def weighted(experience, gain, kind):
    """The experience with the step weights of a kind, on its device; gain: of the kernel, by step."""
    weights = step_weights(gain, experience.rollout.step[experience.row], kind)
    return dataclasses.replace(experience, weight=None if weights is None else weights.to(experience.advantage.device))


def rows_of(experience, samples):
    """The rows of the samples, in their order, those that leave one state together: [[row, ...], ...]."""
    ends, by_state = experience.sizes.cumsum(0), {}
    before = experience.rollout.before[experience.row].tolist()
    for sample in samples.tolist():
        for row in range(int(ends[sample] - experience.sizes[sample]), int(ends[sample])):
            by_state.setdefault(before[row], []).append(row)
    return [*by_state.values()]
