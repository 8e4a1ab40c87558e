"""Step weights: the same gradient at the denoiser's output from every step, and the losses multiplied by them."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from test_update import (
    away_from_the_sampler,
    following,
    gradient,
    learner_of,
    one_by_one,
    sampled,
    seeded,
    settings,
)

from b2diffurl import gaussian
from b2diffurl.ddim import DDIM
from b2diffurl.experience import weighted
from b2diffurl.flow import SAMPLERS, Flow
from b2diffurl.step_weights import step_weights
from b2diffurl.update import accumulate


def flow(sampler):
    flow_scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow_scheduler.set_timesteps(20)
    return Flow(flow_scheduler, 0.7, sampler)


@pytest.mark.parametrize("kind", ["ddim", *SAMPLERS])
def test_every_step_gives_the_same_gradient_at_the_denoisers_output(scheduler, kind):
    kernel = DDIM(scheduler, 1.0) if kind == "ddim" else flow(kind)
    steps = torch.tensor([3, 3, 9, 14, 17, 18])
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(steps), 4, 8, 8, generator=generator)
    latents, noise = latents * 0.1, noise[:1].expand_as(noise)  # the same noise in every step
    prediction = torch.zeros_like(latents, requires_grad=True)
    mean, sigma = kernel.transition(prediction, steps, latents)
    log_prob = gaussian.log_prob((mean + sigma * noise).detach(), mean, sigma)
    norms = torch.autograd.grad(log_prob.sum(), prediction)[0].flatten(1).norm(dim=1)
    weights = step_weights(kernel.gain, steps, "inverse_gain")
    assert norms.max() > 2 * norms.min()
    torch.testing.assert_close(norms * weights, (norms * weights).mean().expand(len(steps)), rtol=1e-4, atol=0)
    assert weights.mean().item() == pytest.approx(1)
    assert step_weights(kernel.gain, steps, "one") is None


def test_the_weights_are_where_the_experience_is(scheduler):
    """What rows are indexed by stays on the CPU, what losses are multiplied by does not."""
    policy = learner_of(scheduler).policy
    there = weighted(sampled(policy, n=3).to("meta"), policy.kernel.gain, "inverse_gain")
    assert there.weight.device == there.advantage.device == torch.device("meta")
    assert there.rollout.step.device == torch.device("cpu")
    assert weighted(there, policy.kernel.gain, "one").weight is None


def test_the_gradient_is_that_of_the_weighted_losses(scheduler):
    learner = learner_of(scheduler)
    policy, experience = learner.policy, sampled(learner.policy, n=3)
    steps = experience.rollout.step[experience.row]
    experience = weighted(experience, policy.kernel.gain, "inverse_gain")
    away_from_the_sampler(learner)

    def loss_of(row, density):
        transition, advantage = experience.row[row], experience.advantage[row].double()
        old = experience.rollout.log_prob[transition].double()
        ratio = (density.log_prob(following(experience, transition)).mean() - old).exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.1))
        inverse = [1 / policy.kernel.gain(step) for step in steps.tolist()]
        return loss * inverse[row] / (sum(inverse) / len(inverse))

    wanted = one_by_one(policy, experience, range(len(experience.row)), loss_of)
    accumulate(learner, experience, torch.arange(experience.samples), settings(batch_size=5), seeded())
    assert (gradient(learner) - wanted).norm() < 1e-3 * wanted.norm()
