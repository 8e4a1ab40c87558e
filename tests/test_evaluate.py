"""The before/after measures against brute force."""

import itertools

import numpy as np
import pytest

from b2diffurl.evaluate import bootstrap_interval, feature_distance, table


def test_diversity_is_the_mean_cosine_distance_of_pairs_within_a_prompt():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 5, 8))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    pairs = [1 - a @ b for prompt in features for a, b in itertools.combinations(prompt, 2)]
    assert feature_distance(features) == pytest.approx(np.mean(pairs))
    assert feature_distance(np.repeat(features[:, :1], 3, axis=1)) == pytest.approx(0, abs=1e-12)
    assert feature_distance(features[:, :1]) == 0.0


def test_interval_covers_the_mean_at_the_nominal_rate():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(0.5, 0.2, size=40))
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_table_has_a_row_for_each_model_and_list():
    row = {"images": 8, "reward": 0.1, "reward_interval": [0, 0.2], "diversity": 0.3}
    results = [
        {"model": m, "prompts": p, **row, **({"oracle": 0.5, "oracle_interval": [0.4, 0.6]} if p == "train" else {})}
        for m in ("before", "after")
        for p in ("train", "held-out")
    ]
    lines = table(results).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["train", "before"], ["train", "after"], ["held-out", "before"], ["held-out", "after"],
    ]  # fmt: skip
    assert "0.500 [0.400, 0.600]" in lines[1]
