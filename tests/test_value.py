"""DPOK's learned baseline: it learns, it is subtracted, it goes on over stages with the same numbers."""

import types

import pytest
import torch

from b2diffurl.update import Pairs
from b2diffurl.value import Baseline

N, LENGTH = 40, 3


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(N, LENGTH + 1, 4, 8, 8, generator=generator)
    return Pairs(
        latents, torch.zeros(N, LENGTH), torch.tensor([951, 501, 51]), latents[:, 0].mean(dim=(1, 2, 3)) * 20,
        torch.randn(N, 16, 64, generator=generator), torch.zeros(1, 16, 64),
    )  # fmt: skip


def make():
    config = types.SimpleNamespace(
        seed=3, train=types.SimpleNamespace(value_learning_rate=1e-3, trajectories_per_update=16)
    )
    size = types.SimpleNamespace(in_channels=4, sample_size=8, cross_attention_dim=64)
    return Baseline(config, types.SimpleNamespace(config=size, device=torch.device("cpu")))


def test_it_starts_as_none_and_learns_what_the_latent_tells(pairs):
    baseline = make()
    assert torch.equal(baseline.of(pairs), torch.zeros(N, LENGTH))
    first = baseline.fit(pairs, 1, torch.Generator().manual_seed(0))
    last = baseline.fit(pairs, 60, torch.Generator().manual_seed(0))
    assert last < first / 10
    values = baseline.of(pairs)
    assert torch.corrcoef(torch.stack([values.mean(1), pairs.advantages]))[0, 1] > 0.9
    rows, steps = torch.tensor([7, 3]), torch.tensor([2, 0])
    torch.testing.assert_close(baseline.predict(pairs, rows, steps), values[rows, steps])


def test_saved_and_loaded_it_goes_on_with_the_same_numbers(pairs, tmp_path):
    one, other = make(), make()
    one.fit(pairs, 2, torch.Generator().manual_seed(0))
    one.save(tmp_path / "value.safetensors")
    other.load(tmp_path / "value.safetensors")
    for baseline in (one, other):
        baseline.fit(pairs, 2, torch.Generator().manual_seed(1))
    assert torch.equal(one.of(pairs), other.of(pairs))


def test_making_one_leaves_the_random_state_alone():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    make()
    assert torch.equal(torch.rand(1), wanted)
