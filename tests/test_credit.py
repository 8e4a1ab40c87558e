"""Credit against its definition, group by group and node by node."""

import statistics

import numpy as np
import pytest

from b2diffurl.credit import RULES, assign, rule_of, weigh
from b2diffurl.errors import UserError
from b2diffurl.plan import Plan, stage_plan
from b2diffurl.run.command import parse
from b2diffurl.selection import select_pairs

GROUPS = 7
FORKS = "((6, 2), (10, 2), (14, 2))"


def configure(*settings):
    flags = [f"--config.{setting}" for setting in settings]
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]


def rewards(branches, seed=0):
    found = np.random.default_rng(seed).normal(size=(GROUPS, branches))
    found[2] = found[2, 0]  # a group that was all right, or all wrong
    return found


def nodes_of(plan, group, values):
    """{(level, node): (mean of its images, the rollout's transitions that lead to it)} of a group."""
    table, found = plan.transitions, {}
    for level, own in enumerate(plan.levels):
        share = plan.images // own.nodes
        for node in range(own.nodes):
            rows = [i for i in range(len(table.step)) if (table.level[i], table.node[i]) == (level, node)]
            if rows:
                mean = statistics.fmean(values[node * share : (node + 1) * share])
                found[level, node] = mean, [group * len(table.step) + row for row in rows]
    return found


def expected(plan, normalised, config):
    """[(transitions, advantage)] of every sample, by the rules as they are written in the docstrings."""
    samples = []
    for group, values in enumerate(normalised):
        nodes = nodes_of(plan, group, values)
        for level in sorted({level for level, _ in nodes}):
            own = [(nodes[level, node]) for node in range(plan.levels[level].nodes)]
            worth = [value for value, _ in own]
            if config.select.credit == "all":
                samples += [(rows, value) for value, rows in own]
            elif config.select.credit == "group":
                spread = statistics.stdev(worth)
                if spread > 1e-8:
                    samples += [(rows, (value - statistics.fmean(worth)) / spread) for value, rows in own]
            elif config.select.credit == "ranked":  # the best quarter, each twice, and the worst half
                order = sorted(range(len(own)), key=lambda node: -worth[node])
                quarter = len(own) // 4
                for place in range(2 * quarter):
                    pair = own[order[place // 2]], own[order[place - 2 * quarter]]
                    samples += [(rows, value) for value, rows in pair if pair[0][0] > pair[1][0]]
            else:
                size = plan.siblings(level)
                for first in range(0, len(own), size):
                    children = own[first : first + size]
                    best, worst = max(children, key=lambda c: c[0]), min(children, key=lambda c: c[0])
                    samples += [(best[1], best[0])] if best[0] >= config.select.pos_threshold else []
                    samples += [(worst[1], worst[0])] if worst[0] < config.select.neg_threshold else []
    return samples


@pytest.mark.parametrize(("method", "forks"), [("b2", "()"), ("ddpo", "()"), ("b2", FORKS)])
@pytest.mark.parametrize("rule", RULES)
def test_credit_is_its_definitions(rule, forks, method):
    branches = 8 if forks != "()" else 5
    if rule == "ranked" and forks != "()":
        with pytest.raises(UserError, match="ranks a group's own images"):
            configure(f"select.credit={rule}", f"schedule.forks={forks}", f"sample.branches={branches}")
        return
    config = configure(f"select.credit={rule}", f"schedule.forks={forks}", f"sample.branches={branches}",
                       f"method={method}", "train.adv_clip=1.5", "train.negative_weight=0.5")  # fmt: skip
    plan, normalised = stage_plan(config), rewards(branches)
    credit, _ = assign(plan, normalised, config)
    found = [
        (credit.row[credit.sample == number].tolist(), credit.advantage[credit.sample == number])
        for number in range(credit.sample.max() + 1)
    ]
    wanted = {tuple(rows): advantage for rows, advantage in expected(plan, normalised, config)}
    assert len(found) == len(expected(plan, normalised, config))
    assert {tuple(rows) for rows, _ in found} == set(wanted)
    for rows, advantages in found:
        clamped = max(-1.5, min(1.5, wanted[tuple(rows)]))
        assert advantages.tolist() == pytest.approx([clamped * (1 if clamped > 0 else 0.5)] * len(rows), abs=1e-6)
    assert credit.rival is None


def test_the_papers_selection_is_the_default_and_no_branches_keep_everything():
    normalised = rewards(5)
    for method, kept in (("b2", None), ("ddpo_bs", None), ("ddpo", GROUPS * 5), ("ddpo_bpt", GROUPS * 5)):
        config = configure(f"method={method}")
        credit, chosen = assign(stage_plan(config), normalised, config)
        best = (normalised.max(1) >= 0.5).sum() + (normalised.min(1) < -0.5).sum()
        assert chosen.sum() == credit.sample.max() + 1 == (kept or best)


def test_chosen_are_the_images_that_are_trained_on():
    """Preferences train on couples: a best that has no worst to win against is not among them."""
    config = configure("train.algorithm=dpo", "sample.branches=3")
    for normalised, wanted in (([[1, 0, 0], [0, 0, -1]], []), ([[1, 0, -1], [0, 0, -1]], [0, 2])):
        credit, chosen = assign(stage_plan(config), np.array(normalised, dtype=np.float64), config)
        assert np.flatnonzero(chosen).tolist() == wanted
        assert len(np.unique(credit.sample)) == len(wanted) // 2


def test_a_groups_uniform_rewards_say_nothing():
    config = configure("select.credit=group")
    credit, chosen = assign(stage_plan(config), rewards(5), config)
    assert not chosen.reshape(GROUPS, 5)[2].any()
    assert chosen.sum() == (GROUPS - 1) * 5
    advantages = credit.advantage.reshape(GROUPS - 1, 5, -1)[..., 0]
    assert advantages.mean(1) == pytest.approx(0, abs=1e-6)
    assert advantages.std(1, ddof=1) == pytest.approx(1, abs=1e-6)
    config.sample.branches = 1
    assert not len(assign(Plan(20, 6, 1, ((6, 1),)), rewards(1), config)[0].row)  # one image has no spread


@pytest.mark.parametrize("forks", ["()", FORKS])
def test_a_preference_is_a_winner_with_its_loser_at_the_same_steps(forks):
    branches = 8 if forks != "()" else 5
    config = configure("train.algorithm=dpo", f"schedule.forks={forks}", f"sample.branches={branches}")
    plan, normalised = stage_plan(config), rewards(branches)
    credit, _ = assign(plan, normalised, config)
    table, per_group = plan.transitions, len(plan.transitions.step)
    pairs = set()
    for row, rival in zip(credit.row, credit.rival, strict=True):
        assert row // per_group == rival // per_group  # of one group
        won, lost = row % per_group, rival % per_group
        assert table.step[won] == table.step[lost]
        assert table.level[won] == table.level[lost]
        pairs.add((row // per_group, table.level[won], table.node[won], table.node[lost]))
    wanted = set()
    for group, values in enumerate(normalised):
        nodes = nodes_of(plan, group, values)
        for level in {level for level, _ in nodes}:
            size = plan.siblings(level)
            for first in range(0, plan.levels[level].nodes, size):
                worth = {node: nodes[level, node][0] for node in range(first, first + size)}
                best, worst = max(worth, key=worth.get), min(worth, key=worth.get)
                if worth[best] >= 0.5 and worth[worst] < -0.5:
                    wanted.add((group, level, best, worst))
    assert pairs == wanted


def test_no_image_is_preferred_to_itself():
    config = configure("train.algorithm=dpo", "select.pos_threshold=-9", "select.neg_threshold=9")
    credit, chosen = assign(stage_plan(config), rewards(5), config)
    assert credit.sample.max() + 1 == GROUPS - 1
    assert not chosen.reshape(GROUPS, 5)[2].any()


def test_nothing_good_or_bad_enough_is_no_credit():
    config = configure("select.pos_threshold=99", "select.neg_threshold=-99")
    credit, chosen = assign(stage_plan(config), rewards(5), config)
    assert len(credit.row) == len(credit.advantage) == len(credit.sample) == chosen.sum() == 0
    full = assign(stage_plan(config), rewards(5), configure())[0]
    assert len(full.row) > len(full.none().row) == 0


def test_advantages_are_clamped_and_weighted_by_their_sign():
    assert weigh([9.0, 2.0, 0.0, -1.0], 3, 0.5, 2).tolist() == [1.5, 1.0, 0.0, -2.0]
    assert weigh([-9.0, -2.0, 0.0, 1.0], 3, 0.5, 2).tolist() == [-6.0, -4.0, 0.0, 0.5]
    assert weigh([1.0], 5).dtype == np.float32


def test_a_trees_nodes_are_normalised_within_their_level_by_default():
    """Means of images spread less than images: against fixed thresholds inner nodes would hardly ever be chosen."""
    config = configure(f"schedule.forks={FORKS}", "sample.branches=8")
    assert rule_of(config) == "group"
    credit, _ = assign(stage_plan(config), rewards(8), config)
    assert credit.sample.max() + 1 == (GROUPS - 1) * (2 + 4 + 8)
    config.train.algorithm = "dpo"
    assert rule_of(config) == "contrast"


def test_preferences_of_ranked_images_are_references_against_their_bases():
    config = configure("train.algorithm=dpo", "select.credit=ranked", "method=ddpo", "sample.branches=8")
    plan, normalised = stage_plan(config), rewards(8)
    credit, _ = assign(plan, normalised, config)
    steps = len(plan.transitions.step) // 8
    found = zip(credit.row[::steps] // steps, credit.rival[::steps] // steps, strict=True)
    assert [(int(best), int(worst)) for best, worst in found] == [
        (8 * group + best, 8 * group + worst) for group, best, worst in select_pairs(normalised)
    ]
    assert credit.sample.tolist() == [number for number in range(credit.sample.max() + 1) for _ in range(steps)]
