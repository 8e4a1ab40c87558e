"""The flow-matching step against its formulas in float64, its marginals, DDIM and the library's ODE."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from b2diffurl.flow import SAMPLERS, Flow, transition


def expected(v, x, sigma, following, a, sampler):
    """Mean and standard deviation of one number, in Python's own floats, written out from the papers."""
    step = following - sigma
    x0, noise = x - sigma * v, x + (1 - sigma) * v
    if sampler == "cps":
        std = following * math.sin(a * math.pi / 2)
        return (1 - following) * x0 + math.sqrt(following**2 - std**2) * noise, std
    s = a if sampler == "dance_sde" else a * math.sqrt(sigma / (1 - (following if sigma == 1 else sigma)))
    score = -noise / sigma
    return x + (v - s**2 / 2 * score) * step, s * math.sqrt(-step)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(5,), (4, 3, 3), (6, 4)])
def test_mean_and_deviation_are_the_formulas(sampler, shape):
    generator = torch.Generator().manual_seed(0)
    v, x = torch.randn(2, 4, *shape, generator=generator)
    sigmas, following = [1.0, 0.9, 0.5, 0.2], [0.95, 0.7, 0.3, 0.01]
    mean, std = transition(v, x, torch.tensor(sigmas), torch.tensor(following), 0.7, sampler)
    assert mean.shape == x.shape
    full = [torch.tensor(own).view(4, *[1] * len(shape)) for own in (sigmas, following)]
    assert all(torch.equal(*own) for own in zip((mean, std), transition(v, x, *full, 0.7, sampler), strict=True))
    assert std.shape == (4, *[1] * len(shape))
    assert (mean.dtype, std.dtype) == (torch.float32, torch.float32)
    for b, (sigma, after) in enumerate(zip(sigmas, following, strict=True)):
        for i in np.ndindex(*shape):
            wanted = expected(v[b][i].item(), x[b][i].item(), sigma, after, 0.7, sampler)
            assert (mean[b][i].item(), std[b].item()) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("sampler", "a", "std"), [("cps", 0.7, 0.450), ("flow_sde", 0.7, 0.488), ("dance_sde", 0.3, 0.453)]
)
def test_the_marginal_of_a_point_mass(sampler, a, std):
    """Data at 0: x_.60 = .60 ε, and its step to .45 should have a standard deviation of .45; only cps has."""
    x = 0.6 * torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    mean, own = transition(x / 0.6, x, 0.6, 0.45, a, sampler)
    drawn = mean + own * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert drawn.std().item() == pytest.approx(std, abs=0.002)
    assert drawn.mean().item() == pytest.approx(0, abs=0.004)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_noise_it_is_the_librarys_ode_step(sampler):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    v, x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for k in (0, 4, 9):
        scheduler._step_index = k
        wanted = scheduler.step(v, scheduler.timesteps[k], x).prev_sample
        mean, std = transition(v, x, scheduler.sigmas[k], scheduler.sigmas[k + 1], 0.0, sampler)
        torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-5)
        assert not std.any()


def test_cps_is_ddims_transition_on_the_flows_schedule(scheduler):
    """With x̂0, ε̂ and τ given, both are mean = α' x̂0 + √(s'² - τ²) ε̂ (DDIM eq. 12)."""
    from b2diffurl import ddim

    x, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = scheduler.timesteps[[9, 9]]
    a, a_next = (scheduler.alphas_cumprod[own].double() for own in (t[0], t[0] - 50))
    scale, after = a.sqrt() + (1 - a).sqrt(), a_next.sqrt() + (1 - a_next).sqrt()  # to x0's and ε's weights' sum of 1
    sigma, following = (1 - a).sqrt() / scale, (1 - a_next).sqrt() / after
    x0 = (x - (1 - a).sqrt() * noise) / a.sqrt()
    wanted, wanted_std = ddim.transition(scheduler, noise, t, x, 0.8)
    level = math.asin((wanted_std[0].item() / (1 - a_next).sqrt()).item()) * 2 / math.pi
    mean, std = transition(noise - x0, x / scale, sigma, following, level, "cps")
    torch.testing.assert_close(mean * after.float(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(std * after.float(), wanted_std, rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused():
    x = torch.zeros(1, 2)
    for level, sampler, message in ((0.5, "euler", "unknown sampler 'euler': cps"), (-1, "dance_sde", "at least 0"),
                                    (1.2, "cps", "with cps at most 1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            transition(x, x, 0.5, 0.4, level, sampler)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_step_of_a_flow_is_the_odes_and_no_other(sampler):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    v, x = torch.randn(2, 10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = Flow(scheduler, 0.7, sampler).transition(v, torch.arange(10), x)
    assert (std.flatten() > 0).tolist() == [True] * 9 + [False]
    torch.testing.assert_close(mean[9], x[9] - scheduler.sigmas[9] * v[9])
