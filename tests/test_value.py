"""DPOK's learned baseline: it learns, it is subtracted, it goes on over stages with the same numbers."""

import types

import pytest
import torch
from small import SHAPE, random_prompts

from b2diffurl.experience import Experience
from b2diffurl.rollout import Rollout
from b2diffurl.value import Baseline

N, LENGTH = 40, 3
TIMES = torch.tensor([951, 501, 51])


@pytest.fixture
def experience():
    """N images of LENGTH transitions, whose advantage the first latent tells."""
    latents = torch.randn(N, LENGTH + 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    sample, step = torch.arange(N).repeat_interleave(LENGTH), torch.arange(LENGTH).repeat(N)
    before = sample * (LENGTH + 1) + step
    rollout = Rollout(latents.flatten(0, 1), before, before + 1, step, torch.zeros(N * LENGTH), sample)
    advantage = latents[:, 0].mean(dim=(1, 2, 3)) * 20
    return Experience(rollout, random_prompts(N), torch.arange(N * LENGTH), advantage[sample], sample)


def make():
    config = types.SimpleNamespace(
        seed=3, train=types.SimpleNamespace(value_learning_rate=1e-3, trajectories_per_update=16)
    )
    kernel, family = types.SimpleNamespace(time=lambda step: TIMES[step]), types.SimpleNamespace(latent_shape=SHAPE)
    policy = types.SimpleNamespace(family=family, kernel=kernel, negative=random_prompts(1), device=torch.device("cpu"))
    return Baseline(config, policy)


def test_it_starts_as_none_and_learns_what_the_latent_tells(experience):
    baseline = make()
    assert torch.equal(baseline.of(experience), torch.zeros(N * LENGTH))
    first = baseline.fit(experience, 1, torch.Generator().manual_seed(0))
    last = baseline.fit(experience, 60, torch.Generator().manual_seed(0))
    assert last < first / 10
    values = baseline.of(experience)
    of_image = values.view(N, LENGTH).mean(1), experience.advantage.view(N, LENGTH)[:, 0]
    assert torch.corrcoef(torch.stack(of_image))[0, 1] > 0.9
    rows = torch.tensor([7 * LENGTH + 2, 3 * LENGTH])
    torch.testing.assert_close(baseline.predict(experience, rows), values[rows])


def test_saved_and_loaded_it_goes_on_with_the_same_numbers(experience):
    one, other = make(), make()
    one.fit(experience, 2, torch.Generator().manual_seed(0))
    other.restore({name: tensor.clone() for name, tensor in one.state().items()})
    for baseline in (one, other):
        baseline.fit(experience, 2, torch.Generator().manual_seed(1))
    assert torch.equal(one.of(experience), other.of(experience))


def test_making_one_leaves_the_random_state_alone():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    make()
    assert torch.equal(torch.rand(1), wanted)
