"""The DDIM transition against diffusers' own step, and its log-probability against float64 densities."""

import pytest
import torch
from diffusers import DDIMScheduler

from b2diffurl.ddim import ddim_step_with_logprob, transition


def make(prediction_type="epsilon", clip_sample=False, schedule="scaled_linear"):
    scheduler = DDIMScheduler(
        beta_schedule=schedule,
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=clip_sample,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(20)
    return scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_sample_is_that_of_diffusers(prediction_type, clip_sample, eta):
    scheduler = make(prediction_type, clip_sample)
    torch.manual_seed(0)
    for t in scheduler.timesteps:
        x, output = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        ours, _ = ddim_step_with_logprob(
            scheduler, output, t.expand(3), x, eta, generator=torch.Generator().manual_seed(5)
        )
        theirs = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_log_prob_is_the_mean_of_float64_normal_densities_for_mixed_timesteps():
    scheduler = make()
    torch.manual_seed(0)
    timesteps = scheduler.timesteps[[0, 7, 13, 19]]
    x, output = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    previous, log_prob = ddim_step_with_logprob(scheduler, output, timesteps, x, 1.0)
    alphas = scheduler.alphas_cumprod.double()
    for i, t in enumerate(timesteps.tolist()):
        a, a_prev = alphas[t], alphas[max(t - 50, 0)]
        sigma = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        e = output[i].double()
        x0 = (x[i].double() - (1 - a).sqrt() * e) / a.sqrt()
        mean = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * e
        wanted = torch.distributions.Normal(mean, sigma).log_prob(previous[i].double()).mean()
        assert log_prob[i].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-4)
    assert log_prob.dtype == torch.float32
    assert log_prob.shape == (4,)


def test_last_step_has_a_finite_log_prob():
    scheduler = make()
    mean, sigma = transition(scheduler, torch.zeros(1, 4, 8, 8), scheduler.timesteps[-1:], torch.zeros(1, 4, 8, 8), 1.0)
    assert sigma.item() > 0
    assert torch.isfinite(mean).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scoring_what_was_stored_gives_the_same_log_prob(dtype):
    scheduler = make()
    x, output = torch.randn(20, 4, 8, 8).to(dtype), torch.randn(20, 4, 8, 8).to(dtype)
    previous, log_prob = ddim_step_with_logprob(scheduler, output, scheduler.timesteps, x, 1.0)
    assert previous.dtype == dtype
    same, again = ddim_step_with_logprob(scheduler, output, scheduler.timesteps, x, 1.0, prev_sample=previous)
    assert same is previous
    torch.testing.assert_close(again, log_prob, rtol=0, atol=0)


def test_gradient_of_the_log_prob_reaches_the_prediction():
    scheduler = make()
    output = torch.randn(2, 4, 8, 8, dtype=torch.float32, requires_grad=True)
    previous = torch.randn(2, 4, 8, 8)
    ddim_step_with_logprob(scheduler, output, scheduler.timesteps[[3, 9]], torch.randn(2, 4, 8, 8), 1.0, previous)[
        1
    ].sum().backward()
    assert output.grad.abs().sum() > 0


def test_refusals():
    scheduler = make()
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="eta"):
        ddim_step_with_logprob(scheduler, x, scheduler.timesteps[:1], x, 0.0)
    thresholding = DDIMScheduler.from_config(scheduler.config, thresholding=True)
    thresholding.set_timesteps(20)
    with pytest.raises(ValueError, match="thresholding"):
        ddim_step_with_logprob(thresholding, x, scheduler.timesteps[:1], x, 1.0)
