"""Noise streams: distinct, repeatable, normal; and the work that is made ready ahead."""

import threading
import time

import pytest
import torch

from b2diffurl.ahead import ahead
from b2diffurl.noise import draw_prompts, stream_noise, stream_seed

SHAPE = (4, 8, 8)


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


def test_prompts_are_drawn_uniformly():
    drawn = torch.tensor(draw_prompts(300, 0, 45, 90_000))
    counts = torch.bincount(drawn, minlength=45).double()
    assert counts.min() > 0
    assert ((counts - 2000) ** 2 / 2000).sum() < 90  # chi-square with 44 degrees of freedom: P < 1e-4


def test_the_next_is_made_while_the_last_is_used_and_all_come_in_order():
    began, going = [], threading.Event()

    def make(item):
        began.append(item)
        going.set()
        return item * item

    found = ahead(make, range(4))
    assert next(found) == 0
    assert going.wait(10)
    deadline = time.monotonic() + 20
    while len(began) < 2:  # the second is begun though nobody has asked for it
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert [0, *found] == [0, 1, 4, 9]
    assert list(ahead(make, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda item: 1 / item, [1, 0]))
