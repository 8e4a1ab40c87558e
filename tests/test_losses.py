"""The losses against float64 arithmetic and autograd through the density."""

import numpy as np
import pytest
import torch

from b2diffurl.losses import ddpo_is, weigh_advantages


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


def test_advantages_are_clamped_and_weighted_by_sign():
    weighed = weigh_advantages(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), 5.0, 2.0, 0.5)
    assert weighed.tolist() == [-2.5, -0.5, 0.0, 2.0, 10.0]
