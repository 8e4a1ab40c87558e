"""Reward normalisation against a brute-force pool over the last stages."""

import json
import statistics

import numpy as np
import pytest

from b2diffurl.rewards.history import RewardHistory


def test_brute_force_over_many_stages():
    rng = np.random.default_rng(0)
    history, stages = RewardHistory(3), []
    for _ in range(9):
        prompts = rng.choice(["a", "b", "c"], size=12).tolist()
        scores = rng.normal(0.3, 0.1, size=12)
        stages.append(list(zip(prompts, scores, strict=True)))
        ours = history.normalise(prompts, scores)
        pool = [pair for stage in stages[-4:] for pair in stage]
        for prompt, score, r in zip(prompts, scores, ours, strict=True):
            same = [s for p, s in pool if p == prompt]
            std = statistics.stdev(same) if len(same) > 1 else 0.0
            assert r == pytest.approx((score - statistics.fmean(same)) / (std + 1e-8), rel=1e-6)


def test_window_counts_stages_whether_or_not_they_drew_the_prompt():
    history = RewardHistory(1)
    history.normalise(["a", "a"], [0.0, 100.0])
    history.normalise(["b", "b"], [1.0, 2.0])
    assert history.normalise(["a", "a"], [0.0, 1.0]) == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-6)


def test_no_history_uses_this_stage_alone():
    history = RewardHistory(0)
    first = history.normalise(["a", "a"], [0.0, 1.0])
    history.normalise(["a", "a"], [50.0, 60.0])
    assert history.normalise(["a", "a"], [0.0, 1.0]) == pytest.approx(first)
    assert history.state() == []


def test_a_single_score_is_zero():
    assert RewardHistory(8).normalise(["a"], [3.0]).tolist() == [0.0]


def test_state_goes_through_json():
    straight, stored = RewardHistory(2), RewardHistory(2)
    for scores in ([1.0, 2.0], [3.0, 5.0], [2.0, 9.0]):
        wanted = straight.normalise(["x", "x"], scores)
        assert stored.normalise(["x", "x"], scores).tolist() == wanted.tolist()
        stored = RewardHistory.from_state(json.loads(json.dumps(stored.state())), 2)


def test_bad_scores_are_refused_and_not_remembered():
    history = RewardHistory(8)
    with pytest.raises(ValueError, match="non-finite reward for the prompt 'b'"):
        history.normalise(["a", "b"], [1.0, float("nan")])
    with pytest.raises(ValueError, match="one score per prompt"):
        history.normalise(["a"], [1.0, 2.0])
    assert history.state() == []
