"""The losses against float64 arithmetic and autograd through the density."""

import types

import numpy as np
import pytest
import torch

from b2diffurl import gaussian
from b2diffurl.losses import ALGORITHMS, Terms, ddpo_is, ddpo_sf, dpo, dpok


def test_ddpo_is_in_float64():
    rng = np.random.default_rng(0)
    new, old, advantage = rng.normal(-1, 0.2, 1000), rng.normal(-1, 0.2, 1000), rng.normal(size=1000)
    loss, statistics = ddpo_is(torch.tensor(new), torch.tensor(old), torch.tensor(advantage), 0.1)
    ratio = np.exp(new - old)
    wanted = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.9, 1.1))
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    np.testing.assert_allclose(statistics["ratio"], ratio, rtol=1e-12)
    np.testing.assert_array_equal(statistics["clipped"], np.abs(ratio - 1) > 0.1)
    np.testing.assert_allclose(statistics["approx_kl"], (new - old) ** 2 / 2, rtol=1e-12)


def test_at_ratio_one_the_gradient_is_minus_advantage_times_the_score():
    log_prob = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    loss, _ = ddpo_is(log_prob, log_prob.detach(), advantage, 0.1)
    torch.testing.assert_close(loss, -advantage)
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    torch.testing.assert_close(gradient, -advantage)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [(0.2, 1.0, False), (0.2, -1.0, True), (-0.2, -1.0, False), (-0.2, 1.0, True), (0.05, 1.0, True)],
)
def test_clip_stops_only_steps_away_from_the_old_policy(log_ratio, advantage, moves):
    log_prob = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    loss, _ = ddpo_is(log_prob, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]).double(), 0.1)
    loss.sum().backward()
    assert bool(log_prob.grad.abs() > 0) is moves


def test_a_ratio_beyond_float32_is_clipped_like_any_other():
    log_prob = torch.tensor([100.0, 79.0], requires_grad=True)
    loss, _ = ddpo_is(log_prob, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2)
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(-1.2)
    assert log_prob.grad[0] == 0
    assert log_prob.grad[1] == pytest.approx(np.exp(79), rel=1e-4)
    further = torch.tensor([100.0], requires_grad=True)  # not clipped: it must not pass unseen
    ddpo_is(further, torch.zeros(1), torch.tensor([-1.0]), 0.2)[0].sum().backward()
    assert not further.grad.isfinite().any()


def test_ddpo_sf_in_float64():
    rng = np.random.default_rng(1)
    new, old, advantage = rng.normal(-1, 0.2, 100), rng.normal(-1, 0.2, 100), rng.normal(size=100)
    log_prob = torch.tensor(new, requires_grad=True)
    loss, statistics = ddpo_sf(log_prob, torch.tensor(old), torch.tensor(advantage))
    np.testing.assert_allclose(loss.detach(), -advantage * new, rtol=1e-12)
    np.testing.assert_allclose(statistics["ratio"], np.exp(new - old), rtol=1e-12)
    assert not statistics["clipped"].any()  # it has no clip
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    np.testing.assert_allclose(gradient, -advantage)


def test_dpok_is_ddpo_is_plus_the_kl():
    rng = np.random.default_rng(2)
    new, old, advantage, kl = (torch.tensor(rng.normal(size=100)) for _ in range(4))
    base, _ = ddpo_is(new, old, advantage, 0.2)
    loss, statistics = dpok(new, old, advantage, 0.2, kl.abs(), 0.3)
    np.testing.assert_allclose(loss, base + 0.3 * kl.abs(), rtol=1e-12)
    np.testing.assert_array_equal(statistics["kl_pretrained"], kl.abs())
    at_one, _ = dpok(old, old, advantage, 0.2, torch.zeros(100), 0.3)
    np.testing.assert_allclose(at_one, -advantage)


def test_dpo_in_float64_and_its_direction():
    rng = np.random.default_rng(3)
    winner = torch.tensor(rng.normal(size=100), requires_grad=True)
    loser = torch.tensor(rng.normal(size=100), requires_grad=True)
    loss, statistics = dpo(winner, loser, 2.0)
    margin = 2 * (winner - loser).detach().numpy()
    np.testing.assert_allclose(loss.detach(), np.log1p(np.exp(-margin)), rtol=1e-10)
    np.testing.assert_array_equal(statistics["preferred"], margin > 0)
    np.testing.assert_allclose(statistics["approx_kl"], (winner**2 + loser**2).detach() / 4)
    both = np.exp(torch.stack([winner, loser]).detach().numpy())
    np.testing.assert_allclose(abs(statistics["ratio"] - 1), abs(both - 1).max(0))
    up, down = torch.autograd.grad(loss.sum(), [winner, loser])
    np.testing.assert_allclose(up, -2 / (1 + np.exp(margin)), rtol=1e-10)  # descent raises the winner ...
    np.testing.assert_allclose(down, -up)  # ... and lowers the loser as much
    start, _ = dpo(torch.zeros(1), torch.zeros(1), 2.0)
    assert start.item() == pytest.approx(np.log(2))


def test_gaussian_kl_is_torchs_and_its_monte_carlo_estimate():
    generator = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(-1, 1, 1, 1)
    p, q = (torch.distributions.Normal(m, sigma.expand_as(m)) for m in (mean, other))
    wanted = torch.distributions.kl_divergence(p, q).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian.kl(mean, other, sigma), wanted)
    samples = mean + sigma * torch.randn(20000, *mean.shape, generator=generator, dtype=torch.float64)
    estimate = (p.log_prob(samples) - q.log_prob(samples)).mean(0).mean(dim=(1, 2, 3))
    torch.testing.assert_close(estimate, wanted, rtol=0.02, atol=0.01)


def test_a_gaussians_density_does_not_care_for_the_latents_shape():
    value, mean = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(-1, 1, 1, 1)
    wanted = torch.distributions.Normal(mean, sigma.expand_as(mean)).log_prob(value).flatten(1).mean(1)
    torch.testing.assert_close(gaussian.log_prob(value, mean, sigma), wanted, rtol=1e-6, atol=1e-6)
    packed = [tensor.flatten(2) for tensor in (value, mean)]
    torch.testing.assert_close(gaussian.log_prob(*packed, sigma[..., 0]), wanted, rtol=1e-6, atol=1e-6)


def test_an_algorithms_row_hands_its_loss_what_it_takes():
    terms = Terms(*torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    train = types.SimpleNamespace(clip_range=0.3, kl_weight=0.7, dpo_beta=5.0, dpo_clip_range=0.4)
    new, old, advantage, rival, kl, _ = terms
    wanted = {
        "ddpo_is": ddpo_is(new, old, advantage, 0.3), "ddpo_sf": ddpo_sf(new, old, advantage),
        "dpok": dpok(new, old, advantage, 0.3, kl, 0.7), "dpo": dpo(new - old, rival, 5.0, 0.4),
    }  # fmt: skip
    assert wanted.keys() == ALGORITHMS.keys()
    for name, (loss, statistics) in wanted.items():
        found = ALGORITHMS[name].loss(terms, train)
        assert torch.equal(found[0], loss)
        assert found[1].keys() == statistics.keys()
