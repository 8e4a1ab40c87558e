"""Branch sampling: shared states, independent branches, UNet budget, independence of the batch."""

import types

import pytest
import torch
from small import SHAPE, TOKENS, WIDTH, build_policy, conditioning, count_rows, plain_prediction

from b2diffurl.ddim import ddim_step_with_logprob
from b2diffurl.noise import stream_noise, stream_seed
from b2diffurl.plan import Plan
from b2diffurl.rollout import assemble, sample

GROUPS, BRANCHES, STEPS = 3, 4, 20
FLAT = Plan(STEPS, 15, 1, ((15, BRANCHES),))
WHOLE = Plan(STEPS, 0, 1, ((0, BRANCHES),))
LAST = Plan(STEPS, 19, 1, ((19, BRANCHES),))
DDPO = Plan(STEPS, 15, BRANCHES, ((15, 1),))
TREE = Plan(STEPS, 6, 1, ((6, 2), (10, 2), (14, 2)))


def run(unet, scheduler, plan=FLAT, batch_size=5):
    """Sample GROUPS groups, and number the chains that came of it: every image's own states and log-probabilities."""
    torch.manual_seed(1)
    embeds, negative = torch.randn(GROUPS, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)
    seeds = [[stream_seed(0, 0, g, name) for g in range(GROUPS) for name in names] for names in plan.streams()]
    finished, (seen, hook) = {}, count_rows(unet)
    states, log_prob = sample(
        build_policy(unet, scheduler, negative), plan, conditioning(embeds), seeds, batch_size,
        lambda first, x: finished.update({first + i: x[i] for i in range(len(x))}),
    )  # fmt: skip
    hook.remove()
    rollout = assemble(plan, states, log_prob, torch.arange(GROUPS))
    return types.SimpleNamespace(
        states=states, log_prob=log_prob, finished=finished, rollout=rollout, embeds=embeds, negative=negative,
        seen=seen, chains=chains(plan, rollout),
    )  # fmt: skip


def chains(plan, rollout):
    """For every image the rows of its transitions in the rollout, found from its end by what leads to what."""
    per_group, found = len(plan.transitions.step), []
    leading = {after: row for row, after in enumerate(rollout.after.tolist())}
    for row, step in enumerate(rollout.step.tolist()):
        if step < plan.steps - 1:
            continue
        own = [row]
        while (before := rollout.before[own[0]].item()) in leading:
            own.insert(0, leading[before])
        assert {r // per_group for r in own} == {row // per_group}
        found.append(own)
    return found


def plain_chain(unet, scheduler, noise, embeds, negative):
    """An image alone, step by step, with diffusers' own step -> its T + 1 states, and the log-probability of each step.

    noise: (T + 1, ...), that of x_T first.
    """
    states, log_probs = [noise[:1] * scheduler.init_noise_sigma], []
    for step, drawn in enumerate(noise[1:]):
        x, time = states[-1], scheduler.timesteps[step : step + 1]
        with torch.no_grad():
            predicted = plain_prediction(unet, x, time, embeds, negative)
        states.append(scheduler.step(predicted, time[0], x, eta=1.0, variance_noise=drawn[None]).prev_sample)
        log_probs.append(ddim_step_with_logprob(scheduler, predicted, time, x, 1.0, prev_sample=states[-1])[1])
    return torch.cat(states), torch.cat(log_probs)


def streams_of(group, *named):
    """The first draws of the group's noise streams, one stream after the other; named: (name, draws)."""
    return torch.cat([stream_noise(stream_seed(0, 0, group, name), draws, SHAPE) for name, draws in named])


def assert_is_plain(found, unet, scheduler, plan, group, branch, noise):
    """The image's stored states, its log-probabilities and its finished latent are those of its plain loop."""
    states, log_probs = plain_chain(unet, scheduler, noise, found.embeds[group : group + 1], found.negative)
    image, rollout = group * plan.images + branch, found.rollout
    own = found.chains[image]
    stored = rollout.states[torch.cat([rollout.before[own[:1]], rollout.after[own]])]
    torch.testing.assert_close(stored, states[plan.start :], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.finished[image], states[-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rollout.log_prob[own], log_probs[plan.start :], rtol=0, atol=1e-3)
    assert rollout.step[own].tolist() == list(range(plan.start, STEPS))
    assert set(rollout.prompt[own].tolist()) == {group}


@pytest.mark.parametrize("plan", [FLAT, TREE], ids=["flat", "tree"])
def test_shapes_and_final_latents(unet, scheduler, plan):
    found = run(unet, scheduler, plan)
    assert found.states.shape == (GROUPS, plan.states, *SHAPE)
    assert found.log_prob.shape == (GROUPS, len(plan.transitions.step))
    assert sorted(found.finished) == list(range(GROUPS * plan.images))
    for image, latents in found.finished.items():
        torch.testing.assert_close(latents, found.rollout.states[found.rollout.after[found.chains[image][-1]]])


def test_a_group_stores_its_fork_once_and_every_branchs_interval(unet, scheduler):
    found = run(unet, scheduler)
    assert found.states.shape[1] == 1 + BRANCHES * 5
    assert found.log_prob.shape[1] == BRANCHES * 5
    starts = {found.rollout.before[own[0]].item() for own in found.chains}
    assert len(starts) == GROUPS


@pytest.mark.parametrize("batch_size", [5, GROUPS * BRANCHES])
@pytest.mark.parametrize(
    ("plan", "evaluations"),
    [
        (FLAT, 15 + 1 + BRANCHES * 4),  # (T-s) + 1 + K (s-1): the prefix once, and the fork's state once for all
        (WHOLE, 1 + BRANCHES * 19),
        (LAST, 19 + 1),
        (DDPO, BRANCHES * STEPS),
        (TREE, 71),
    ],
    ids=["flat", "whole", "last step", "ddpo", "tree"],
)
def test_the_unet_is_asked_once_for_every_state(unet, scheduler, plan, evaluations, batch_size):
    seen = run(unet, scheduler, plan, batch_size).seen
    assert sum(seen) == 2 * GROUPS * evaluations == 2 * GROUPS * plan.evaluations  # both halves of the guidance
    assert max(seen) <= 2 * batch_size


def test_an_image_is_the_plain_loop_over_its_own_noise(unet, scheduler):
    """Group 2, branch 1: the prefix' noise first, x_T's before all, then the branch's own."""
    noise = streams_of(2, ("prefix", 16), (1, 5))
    assert_is_plain(run(unet, scheduler), unet, scheduler, FLAT, 2, 1, noise)


def test_without_branches_an_image_has_a_prefix_of_its_own(unet, scheduler):
    found = run(unet, scheduler, DDPO)
    for branch in range(BRANCHES):
        noise = streams_of(1, (f"prefix of {branch}", 16), (branch, 5))
        assert_is_plain(found, unet, scheduler, DDPO, 1, branch, noise)


def test_every_image_of_a_tree_is_the_plain_loop_over_the_noise_of_its_ancestors_and_its_own(unet, scheduler):
    """x_T and six steps from the root's stream, then four from each node's on the way, then the image's own."""
    found = run(unet, scheduler, TREE)
    for group in range(GROUPS):
        for image in range(8):
            nodes = (f"fork 1, node {image // 4}", 4), (f"fork 2, node {image // 2}", 4)
            noise = streams_of(group, ("prefix", 7), *nodes, (image, 6))
            assert_is_plain(found, unet, scheduler, TREE, group, image, noise)


@pytest.mark.parametrize("plan", [FLAT, TREE], ids=["flat", "tree"])
def test_batch_size_changes_the_images_by_rounding_alone(unet, scheduler, plan):
    """Kernels sum in another order for another batch: 1e-7 of each prediction, a thousandfold of it after 20 steps."""
    one, many = (run(unet, scheduler, plan, batch_size) for batch_size in (1, 16))
    assert sum(one.seen) == sum(many.seen)
    assert max(one.seen) == 2 < max(many.seen)
    torch.testing.assert_close(one.states, many.states, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.log_prob, many.log_prob, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("plan", [FLAT, TREE], ids=["flat", "tree"])
def test_branches_of_a_group_differ(unet, scheduler, plan):
    finished = run(unet, scheduler, plan).finished
    for image in range(1, plan.images):
        assert (finished[0] - finished[image]).abs().max() > 0.01


def test_guidance_is_the_two_halves_combined(unet, scheduler):
    torch.manual_seed(0)
    x, time = torch.randn(2, *SHAPE), torch.tensor([951, 1])
    embeds, negative = torch.randn(2, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)
    policy = build_policy(unet, scheduler, negative)
    with torch.no_grad():
        conditional = unet(x, time, encoder_hidden_states=embeds).sample
        unconditional = unet(x, time, encoder_hidden_states=negative.expand(2, -1, -1)).sample
        ours = policy.family.predict(unet, x, time, conditioning(embeds), policy.negative, 3.0)
    torch.testing.assert_close(ours, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)
