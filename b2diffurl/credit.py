"""From rewards to what is trained on: which transitions, with what advantage, against which others.

A node of a group's forest is worth the mean of its images' normalised rewards. A rule compares a level's nodes and
chooses some; the transitions of a chosen node are trained on with the node's advantage. In the paper's group, one fork,
the nodes are the branches.
"""

import dataclasses

import numpy as np

from .losses import ALGORITHMS
from .plan import METHODS, stage_plan
from .selection import select_contrasts, select_pairs

EPSILON = 1e-8  # beside a standard deviation


@dataclasses.dataclass
class Credit:
    """n transitions to train on, sample by sample; arrays (n,).

    A sample, the unit that updates are cut by, is a chosen node with all its trained steps; in a preference it is a
    winner, with its loser in `rival`.
    """

    row: np.ndarray  # which transition of the rollout
    advantage: np.ndarray  # float32
    sample: np.ndarray  # which sample it belongs to, counted from 0
    rival: np.ndarray | None = None  # the loser's transition at the same step; None without preferences

    def none(self):
        """The Credit of a stage in which nothing is trained on."""
        return Credit(**{name: array if array is None else array[:0] for name, array in vars(self).items()})


def contrast(values, siblings, select):
    """The paper's rule: of the children of a fork the best if good enough, and the worst if bad enough.

    values: (G, nodes). -> nodes (c,), counted through all groups, and their advantages (c,): what they are worth.
    """
    sets = values.reshape(-1, siblings)
    chosen = select_contrasts(sets, select.pos_threshold, select.neg_threshold)
    nodes = np.array([number * siblings + child for number, child in chosen], dtype=np.int64)
    return nodes, values.reshape(-1)[nodes]


def group(values, siblings, select):
    """GRPO's rule (arXiv 2402.03300): all nodes of a level, normalised among those of their group.

    A level of a group without a spread says nothing and is left out. Among all of the level and not among a fork's
    children alone, as in BranchGRPO: two children would always be ±0.7 apart.
    """
    spread = values.std(axis=1, ddof=1, keepdims=True) if values.shape[1] > 1 else np.zeros((len(values), 1))
    advantages = (values - values.mean(axis=1, keepdims=True)) / (spread + EPSILON)
    nodes = np.flatnonzero(np.broadcast_to(spread > EPSILON, values.shape))
    return nodes, advantages.reshape(-1)[nodes]


def everything(values, siblings, select):
    """DDPO's rule: all nodes, with what they are worth."""
    return np.arange(values.size), values.reshape(-1)


def ranked(values, siblings, select):
    """D-Fusion's references and bases themselves (selection.select_pairs): each reference, then its base."""
    sets = values.reshape(-1, siblings)
    nodes = [number * siblings + child for number, *pair in select_pairs(sets) for child in pair]
    nodes = np.array(nodes, dtype=np.int64)
    return nodes, values.reshape(-1)[nodes]


def targets(values, siblings, select, kept):
    """D-Fusion's rule: of every kept pair of a base and its target the target, then the base, with what they are worth.

    kept: (G,) bool.
    """
    nodes = (2 * np.flatnonzero(kept)[:, None] + [1, 0]).ravel()
    return nodes, values.reshape(-1)[nodes]


RULES = {"contrast": contrast, "group": group, "all": everything, "ranked": ranked}
PAIRING = ("", "contrast", "ranked")  # that preferences can do with


def weigh(advantages, clip, positive_weight=1.0, negative_weight=1.0):
    """A = clamp(r̂, ±clip), times β₁ where A > 0 and β₂ elsewhere, float32 (paper eq. 9 and its released form)."""
    clamped = np.clip(np.float32(advantages), -np.float32(clip), np.float32(clip))
    return clamped * np.where(clamped > 0, np.float32(positive_weight), np.float32(negative_weight))


def assign(plan, normalised, config, rule=None):
    """The Credit of a stage, and which of its images were chosen: bool (G·K,).

    normalised: (G, K) rewards. rule: a function as those of RULES; rule_of names it unless it is given. For an
    algorithm of preferences a sample is a chosen pair of siblings, winner against loser, and a node that was chosen
    alone is not trained on.
    """
    preference, train = ALGORITHMS[config.train.algorithm].preference, config.train
    rule = rule or RULES[rule_of(config)]
    per_group, groups, table = len(plan.transitions.step), len(normalised), plan.transitions
    found, chosen, samples = [], np.zeros(normalised.size, dtype=bool), 0
    for level, own in enumerate(plan.levels):
        transitions = np.flatnonzero(table.level == level).reshape(own.nodes, -1)  # of each node
        if not transitions.size:
            continue
        values, siblings = normalised.reshape(groups, own.nodes, plan.images // own.nodes).mean(2), plan.siblings(level)
        nodes, advantages = rule(values, siblings, config.select)
        rows = nodes[:, None] // own.nodes * per_group + transitions[nodes % own.nodes]
        rivals = rows[:0]
        if preference:
            won = _couples(nodes, nodes // siblings)
            nodes = nodes[np.concatenate([won, won + 1])]
            rows, rivals, advantages = rows[won], rows[won + 1], advantages[won]
        if own.nodes == plan.images:
            chosen[nodes] = True
        each = rows.shape[1]
        numbers = samples + np.arange(len(rows))
        found.append((rows.ravel(), np.repeat(advantages, each), np.repeat(numbers, each), rivals.ravel()))
        samples += len(rows)
    row, advantage, sample, rival = (np.concatenate(own) for own in zip(*found, strict=True))
    advantage = weigh(advantage, train.adv_clip, train.positive_weight, train.negative_weight)
    return Credit(row, advantage, sample, rival if preference else None), chosen


def most_chosen(config):
    """What config.stage can choose at most, by level: [(nodes of all groups, states of a node with the one above)]."""
    plan, groups = stage_plan(config), config.sample.groups
    if METHODS[config.method].fusion or rule_of(config) == "ranked":  # pairs of select_pairs
        return [(groups * 4 * (config.sample.branches // 4), plan.stored(len(plan.levels) - 1) + 1)]
    found = []
    for level, own in enumerate(plan.levels):
        if plan.trained(level):
            siblings = plan.siblings(level)
            taken = own.nodes // siblings * min(2, siblings) if rule_of(config) == "contrast" else own.nodes
            found.append((groups * taken, plan.stored(level) + plan.from_fork(level)))
    return found


def _couples(nodes, sets):
    """The places of winners that are followed by their loser: another node of the same set, each in one couple."""
    won, place = [], 0
    while place + 1 < len(nodes):
        paired = sets[place] == sets[place + 1] and nodes[place] != nodes[place + 1]
        won += [place] if paired else []
        place += 2 if paired else 1
    return np.array(won, dtype=np.int64)


def rule_of(config):
    """The name in RULES by which the stage's credit is assigned: config.select.credit, or where that is "":

    contrast for preferences, and for the paper's group; group for a tree, whose inner nodes, being means, spread less
    than the images; all where there are no branches to compare.
    """
    preference, branches = ALGORITHMS[config.train.algorithm].preference, METHODS[config.method].branches
    tree = branches and config.schedule.forks and not preference
    return config.select.credit or ("group" if tree else "contrast" if branches or preference else "all")
