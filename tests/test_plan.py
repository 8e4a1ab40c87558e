"""The forest of a group against its definition: every image's own chain of states, merged where they are one."""

import pytest

from b2diffurl.plan import METHODS, Plan, stage_interval, stage_plan
from b2diffurl.run.command import parse

TREE = Plan(20, 6, 1, ((6, 2), (10, 2), (14, 2)))
PLANS = {
    "b2": Plan(20, 6, 1, ((6, 5),)), "whole": Plan(20, 0, 1, ((0, 5),)), "last step": Plan(4, 3, 1, ((3, 3),)),
    "ddpo": Plan(20, 6, 5, ((6, 1),)), "no fork": Plan(4, 0, 3), "tree": TREE,
    "uneven": Plan(9, 2, 1, ((2, 3), (3, 2), (8, 2))), "trained later": Plan(8, 4, 1, ((1, 2), (3, 2), (6, 3))),
    "flow": Plan(6, 2, 1, ((2, 3),), untrained=1), "flow's tree": Plan(9, 2, 1, ((2, 2), (6, 2)), untrained=2),
}  # fmt: skip


def chains(plan):
    """For every image the states that it goes through, as (time, the images that share it)."""
    owners = []
    for time in range(plan.steps + 1):
        count = plan.roots
        for step, fan_out in plan.forks:
            count *= fan_out if time > step else 1
        share = plan.images // count
        owners.append([tuple(range(i // share * share, i // share * share + share)) for i in range(plan.images)])
    return [[(time, owners[time][image]) for time in range(plan.steps + 1)] for image in range(plan.images)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_transitions_are_those_of_the_images_chains_each_once(plan):
    wanted = {
        (chain[k], chain[k + 1]) for chain in chains(plan) for k in range(plan.start, plan.steps - plan.untrained)
    }
    states = {state for pair in wanted for state in pair}
    table = plan.transitions
    rows = list(zip(table.before.tolist(), table.after.tolist(), table.step.tolist(), strict=True))
    assert len(rows) == len(wanted)
    assert {number for before, after, _ in rows for number in (before, after)} == set(range(plan.states))
    assert plan.states == len(states)
    following = {}
    for before, after, _ in rows:
        following.setdefault(before, []).append(after)

    def images_of(state):  # by walking to the ends, which stand in the order of the images
        return [leaf for after in following[state] for leaf in images_of(after)] if state in following else [state]

    ends = sorted({after for _, after, _ in rows} - set(following))
    named = {number: tuple(ends.index(leaf) for leaf in images_of(number)) for number in range(plan.states)}
    assert {((step, named[before]), (step + 1, named[after])) for before, after, step in rows} == wanted


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_transition_belongs_to_the_node_that_it_leads_to(plan):
    table, of_image = plan.transitions, chains(plan)
    for step, level, node in zip(table.step, table.level, table.node, strict=True):
        own = plan.levels[level]
        assert own.first <= step + 1 <= own.last
        share = plan.images // own.nodes
        assert of_image[node * share][step + 1][1] == tuple(range(node * share, (node + 1) * share))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_state_but_the_finished_is_asked_about_once(plan):
    assert plan.evaluations == len({state for chain in chains(plan) for state in chain[:-1]})


def test_the_numbers_of_evaluations():
    """The paper's group costs (T-s) + 1 + K (s-1); of K·s at the interval's start K-1 are saved at its first step."""
    assert PLANS["b2"].evaluations == 6 + 1 + 5 * 13
    assert PLANS["ddpo"].evaluations == 5 * 20
    assert TREE.evaluations == 71  # 8 images; one split at step 6 would take 6 + 1 + 8 * 13
    assert Plan(20, 6, 1, ((6, 8),)).evaluations == 111


def test_nodes_are_compared_with_their_forks_children():
    assert [TREE.siblings(level) for level in (1, 2, 3)] == [2, 2, 2]
    assert PLANS["b2"].siblings(1) == 5
    assert PLANS["ddpo"].siblings(1) == 5  # independent images of one prompt
    assert PLANS["uneven"].siblings(2) == 2


def test_every_node_has_a_noise_stream_of_its_own():
    for plan in PLANS.values():
        names = plan.streams()
        assert [len(own) for own in names] == [level.nodes for level in plan.levels]
        flat = [name for own in names for name in own]
        assert len(set(flat)) == len(flat)
    assert PLANS["b2"].streams() == [["prefix"], [0, 1, 2, 3, 4]]
    assert PLANS["ddpo"].streams()[0] == [f"prefix of {k}" for k in range(5)]


def configure(*settings):
    flags = [f"--config.{setting}" for setting in settings]
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]


def test_a_stages_plan_by_method():
    found = {}
    for method in METHODS:
        config = configure(f"method={method}")
        found[method] = stage_plan(config)
        assert stage_interval(config) == (found[method].start, 20)
    assert found == {
        "b2": Plan(20, 6, 1, ((6, 5),)), "ddpo_bpt": Plan(20, 6, 5, ((6, 1),)),
        "ddpo_bs": Plan(20, 0, 1, ((0, 5),)), "ddpo": Plan(20, 0, 5, ((0, 1),)),
        "dfusion": Plan(20, 6, 5, ((6, 1),)),
    }  # fmt: skip


def test_a_tree_is_trained_from_its_first_fork_or_from_the_intervals_start():
    forks = "schedule.forks=((8, 2), (12, 2))"
    config = configure(forks, "sample.branches=4")
    assert [stage_plan(config).start for config.stage in (0, 11)] == [8, 8]
    config = configure(forks, "sample.branches=4", "schedule.left=10")
    assert [stage_plan(config).start for config.stage in (0, 11)] == [10, 8]
    assert stage_plan(config).forks == ((8, 2), (12, 2))
