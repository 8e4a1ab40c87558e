"""Who shares what: a stage's branch group as a forest of denoising steps (paper section 4.2).

The state at time k is what step k starts from, so time 0 is x_T and time T the finished latent. A fork at step k lets
several states at time k + 1 follow from one at time k. The paper's group has one root and one fork, where the trained
interval starts; plain DDPO's has as many roots as images; more forks make a tree (as in BranchGRPO, arXiv 2509.06040).
"""

import dataclasses
import functools
import typing

import numpy as np

from .noise import stream_seed
from .schedule import interval


class Method(typing.NamedTuple):
    """Which of the paper's two ideas a method has, and D-Fusion's."""

    progressive: bool  # backward progressive training
    branches: bool  # branch-based sampling
    fusion: bool = False  # trains on pairs of a base and its fused target (fusion.py)


METHODS = {
    "b2": Method(progressive=True, branches=True),
    "ddpo_bpt": Method(progressive=True, branches=False),
    "ddpo_bs": Method(progressive=False, branches=True),
    "ddpo": Method(progressive=False, branches=False),
    "dfusion": Method(progressive=True, branches=False, fusion=True),
}


class Level(typing.NamedTuple):
    """The nodes between two forks; a node is a stretch of states, one after the other."""

    first: int  # time of a node's first state
    last: int  # time of its last one, where the next fork is; T for the images
    nodes: int  # in a group
    fan_out: int  # of the fork above: how many of them follow from one node; at the roots all


class Transitions(typing.NamedTuple):
    """The trained transitions of a group, a node's one after the other; arrays (m,)."""

    before: np.ndarray  # the state that it leaves, as a number in the group
    after: np.ndarray  # the state that it leads to
    step: np.ndarray
    level: np.ndarray
    node: np.ndarray  # the node that it belongs to: that of `after`


@dataclasses.dataclass(frozen=True)
class Plan:
    """The forest of one group, the same for every group of a stage."""

    steps: int  # T
    start: int  # the first trained step; not before the first fork
    roots: int  # independent beginnings
    forks: tuple = ()  # of (step, fan-out), by step
    untrained: int = 0  # last steps that are not trained: flow matching's last one is deterministic, without a density

    @functools.cached_property
    def levels(self):
        """[Level], from the roots to the images."""
        levels, first, nodes, above = [], 0, self.roots, self.roots
        for step, fan_out in self.forks:
            levels.append(Level(first, step, nodes, above))
            first, nodes, above = step + 1, nodes * fan_out, fan_out
        return [*levels, Level(first, self.steps, nodes, above)]

    @property
    def images(self):
        """Images of a group."""
        return self.levels[-1].nodes

    @property
    def evaluations(self):
        """Predictions that a group costs: one for every state but the finished ones, however many follow from it."""
        *inner, images = self.levels
        return sum((own.last - own.first + 1) * own.nodes for own in inner) + (images.last - images.first) * self.images

    def siblings(self, level):
        """How many nodes of a level are compared: the children of a fork, or the roots; a fork of one adds nothing."""
        fan_out = self.levels[level].fan_out
        return fan_out if fan_out > 1 or not level else self.siblings(level - 1)

    def stored(self, level):
        """How many of a node's states are stored for training: those that a trained step leaves or leads to."""
        own = self.levels[level]
        return max(0, own.last - self.left_out(level) - max(own.first, self.start) + 1)

    def left_out(self, level):
        """How many of a node's last states come after the trained steps."""
        return max(0, self.levels[level].last - self.steps + self.untrained)

    def trained(self, level):
        """How many trained steps lead to a node's states."""
        return self.stored(level) if self.from_fork(level) else max(0, self.stored(level) - 1)

    def from_fork(self, level):
        """Whether a level's first transition leaves its parent's last state, and is trained as the others are."""
        return level > 0 and self.levels[level].first > self.start

    @property
    def states(self):
        """How many states of a group are stored, numbered level by level and node by node."""
        return sum(self.stored(level) * own.nodes for level, own in enumerate(self.levels))

    @functools.cached_property
    def transitions(self):
        """The trained Transitions."""
        rows, offset, above = [], 0, 0
        for level, own in enumerate(self.levels):
            stored = self.stored(level)
            for node in range(own.nodes):
                state = offset + node * stored
                if self.from_fork(level) and stored:  # the fork's own step, from the parent's last state
                    parent = above + (node // own.fan_out + 1) * self.stored(level - 1) - 1
                    rows.append((parent, state, own.first - 1, level, node))
                time = own.last - self.left_out(level) - stored + 1
                rows += [(state + k, state + k + 1, time + k, level, node) for k in range(stored - 1)]
            above, offset = offset, offset + stored * own.nodes
        return Transitions(*np.array(rows, dtype=np.int64).reshape(-1, 5).T)

    def streams(self):
        """Names of the noise streams, by level: a node draws its first state and its steps from its own."""
        names = [[f"fork {level}, node {node}" for node in range(own.nodes)] for level, own in enumerate(self.levels)]
        names[-1] = [*range(self.images)]
        names[0] = ["prefix"] if self.roots == 1 else [f"prefix of {root}" for root in range(self.roots)]
        return names

    def seeds(self, seed, stage, groups):
        """Seeds of the noise streams of some groups, by level and in their order: [[63-bit number]]."""
        return [[stream_seed(seed, stage, group, name) for group in groups for name in own] for own in self.streams()]


def stage_interval(config):
    """(start, stop) of the denoising steps that config.stage trains; without progressive training, always `right`."""
    schedule = config.schedule
    kind = schedule.kind if METHODS[config.method].progressive else "constant"
    return interval(kind, config.stage, schedule.stage_count, schedule.left, schedule.right, config.sample.num_steps)


def stage_plan(config):
    """The Plan of config.stage.

    Without branches every image has a root of its own, and from the interval on a noise stream of its own. A tree is
    trained from its first fork on, or from the interval's start where that is later.
    """
    (start, steps), branches = stage_interval(config), config.sample.branches
    untrained = config.schedule.untrained
    if not METHODS[config.method].branches:
        return Plan(steps, start, branches, ((start, 1),), untrained)
    forks = tuple(map(tuple, config.schedule.forks)) or ((start, branches),)
    return Plan(steps, max(start, forks[0][0]), 1, forks, untrained)


def pair_plan(plan):
    """The Plan of D-Fusion's pairs: of a base, node 0, and its target, node 1, from the interval's start on."""
    return Plan(plan.steps, plan.start, 2, ((plan.start, 1),), plan.untrained)


def queries(config):
    """Reward queries of a stage; of D-Fusion's targets the most that it can score."""
    targets = 2 * (config.sample.branches // 4) if METHODS[config.method].fusion else 0
    return config.sample.groups * (config.sample.branches + targets)
