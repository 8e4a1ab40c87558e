"""Branch sampling: shared prefix, independent branches, UNet budget, independence of the batch."""

import threading
import time

import pytest
import torch

from b2diffurl.ahead import ahead
from b2diffurl.ddim import ddim_step_with_logprob
from b2diffurl.guidance import guided_noise
from b2diffurl.noise import draw_prompts, stream_noise, stream_seed
from b2diffurl.rollout import Sampler

GROUPS, BRANCHES, STEPS, SHAPE = 3, 4, 20, (4, 8, 8)


def run(unet, scheduler, interval=(15, 20), batch_size=5):
    torch.manual_seed(1)
    embeds, negative = torch.randn(GROUPS, 16, 64), torch.randn(1, 16, 64)
    sampler = Sampler(unet, scheduler, negative, 5.0, 1.0, batch_size)
    roots = [stream_seed(0, 0, g, "prefix") for g in range(GROUPS)]
    branches = [stream_seed(0, 0, g, b) for g in range(GROUPS) for b in range(BRANCHES)]
    finished = {}
    result = sampler.sample(
        embeds,
        roots,
        branches,
        interval,
        lambda first, x: finished.update({first + i: x[i] for i in range(len(x))}),
    )
    return result, finished, embeds, negative


def test_shapes_and_final_latents(unet, scheduler):
    result, finished, *_ = run(unet, scheduler)
    assert result.start_latents.shape == (GROUPS, *SHAPE)
    assert result.latents.shape == (GROUPS * BRANCHES, 5, *SHAPE)
    assert result.log_probs.shape == (GROUPS * BRANCHES, 5)
    for n, latents in finished.items():
        torch.testing.assert_close(latents, result.latents[n, -1])


@pytest.mark.parametrize("interval", [(15, 20), (0, 20)])
def test_unet_budget_is_prefix_once_and_interval_per_branch(unet, scheduler, interval):
    seen = []
    hook = unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    result, *_ = run(unet, scheduler, interval, batch_size=GROUPS * BRANCHES)
    hook.remove()
    length = interval[1] - interval[0]
    assert sum(seen) == result.unet_evals == 2 * GROUPS * ((STEPS - length) + BRANCHES * length)


def test_an_image_is_the_plain_loop_over_its_own_noise(unet, scheduler):
    """Group 2, branch 1, denoised alone, step by step: prefix noise first, then the branch's own."""
    result, _, embeds, negative = run(unet, scheduler)
    prefix = stream_noise(stream_seed(0, 0, 2, "prefix"), 16, SHAPE)
    own = stream_noise(stream_seed(0, 0, 2, 1), 5, SHAPE)
    x = prefix[:1]
    for step, noise in enumerate([*prefix[1:], *own]):
        timesteps = scheduler.timesteps[step : step + 1]
        with torch.no_grad():
            predicted = guided_noise(unet, x, timesteps, embeds[2:3], negative, 5.0)
        drawn = scheduler.step(predicted, timesteps[0], x, eta=1.0, variance_noise=noise[None]).prev_sample
        _, log_prob = ddim_step_with_logprob(scheduler, predicted, timesteps, x, 1.0, prev_sample=drawn)
        x = drawn
        if step == 14:
            torch.testing.assert_close(x[0], result.start_latents[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x[0], result.latents[2 * BRANCHES + 1, -1], rtol=1e-3, atol=1e-3)
    assert log_prob.item() == pytest.approx(result.log_probs[2 * BRANCHES + 1, -1].item(), abs=1e-3)


def test_batch_size_changes_the_images_by_rounding_alone(unet, scheduler):
    """Kernels sum in another order for another batch: 1e-7 of each prediction, a thousandfold of it after 20 steps."""
    one, *_ = run(unet, scheduler, batch_size=1)
    many, *_ = run(unet, scheduler, batch_size=16)
    assert one.unet_evals == many.unet_evals
    torch.testing.assert_close(one.latents, many.latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.log_probs, many.log_probs, rtol=1e-3, atol=1e-3)


def test_branches_of_a_group_differ(unet, scheduler):
    result, *_ = run(unet, scheduler)
    assert (result.latents[0, -1] - result.latents[1, -1]).abs().max() > 0.01


def test_guidance_is_the_two_halves_combined(unet):
    torch.manual_seed(0)
    x, t = torch.randn(2, *SHAPE), torch.tensor([951, 1])
    embeds, negative = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
    with torch.no_grad():
        conditional = unet(x, t, encoder_hidden_states=embeds).sample
        unconditional = unet(x, t, encoder_hidden_states=negative).sample
        ours = guided_noise(unet, x, t, embeds, negative, 3.0)
    torch.testing.assert_close(ours, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


def test_streams_are_distinct_and_repeatable():
    seeds = {stream_seed(s, i, g, b) for s in (0, 1) for i in range(3) for g in range(5) for b in (0, 1, "prefix")}
    assert len(seeds) == 2 * 3 * 5 * 3
    assert torch.equal(stream_noise(7, 3, SHAPE), stream_noise(7, 5, SHAPE)[:3])
    assert not torch.equal(stream_noise(7, 3, SHAPE), stream_noise(7 + 2**40, 3, SHAPE))  # every bit of a seed counts


def test_noise_is_standard_normal():
    noise = stream_noise(stream_seed(300, 0, 1, 2), 20, (4, 64, 64)).double().flatten()
    assert noise.mean().abs() < 4 / len(noise) ** 0.5
    assert noise.var().item() == pytest.approx(1, abs=4 * (2 / len(noise)) ** 0.5)
    ordered, grid = noise.sort().values, (torch.arange(len(noise)) + 0.5) / len(noise)
    distance = (torch.special.ndtr(ordered) - grid).abs().max()  # Kolmogorov-Smirnov: P < 1e-4
    assert distance < 2.23 / len(noise) ** 0.5


def test_the_next_is_made_while_the_last_is_used_and_all_come_in_order():
    began, going = [], threading.Event()

    def make(item):
        began.append(item)
        going.set()
        return item * item

    found = ahead(make, range(4))
    assert next(found) == 0
    assert going.wait(10)
    while len(began) < 2:  # the second is begun though nobody has asked for it
        time.sleep(0.001)
    assert [0, *found] == [0, 1, 4, 9]
    assert list(ahead(make, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda item: 1 / item, [1, 0]))


def test_prompts_are_drawn_uniformly():
    drawn = torch.tensor(draw_prompts(300, 0, 45, 90_000))
    counts = torch.bincount(drawn, minlength=45).double()
    assert counts.min() > 0
    assert ((counts - 2000) ** 2 / 2000).sum() < 90  # chi-square with 44 degrees of freedom: P < 1e-4
