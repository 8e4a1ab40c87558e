"""Per-prompt reward normalisation over a window of stages (paper section 4.2, after DDPO's per-prompt statistics)."""

import numpy as np


class RewardHistory:
    """The scores of the last `window` stages, by prompt."""

    def __init__(self, window):
        if window < 0:
            raise ValueError(f"the history must be 0 or more stages, not {window}")
        self.window = window
        self._stages = []  # oldest first; each {prompt: [score, …]}

    def normalise(self, prompts, scores):
        """r̂ = (r - mean) / (std + 1e-8) of one stage's scores -> float64 (N,); then remember the stage.

        A prompt's mean and unbiased standard deviation pool these scores with those that it got in the last `window`
        calls, where they drew it. A prompt with a single score in all gets 0. Raises ValueError for lengths that differ
        or a non-finite score, before anything is remembered.
        """
        scores = np.asarray(scores, dtype=np.float64)
        prompts = list(prompts)
        if scores.shape != (len(prompts),):
            raise ValueError(f"need one score per prompt: {len(prompts)} prompts, scores of shape {scores.shape}")
        if not np.isfinite(scores).all():
            raise ValueError(f"non-finite reward for the prompt {prompts[int((~np.isfinite(scores)).argmax())]!r}")
        statistics, stage = self.statistics(prompts, scores)
        self._stages = [*self._stages, stage][-self.window :] if self.window else []
        return standardise(prompts, scores, statistics)

    def statistics(self, prompts, scores):
        """By what normalise would normalise a stage, {prompt: (mean, std)}, and the stage, {prompt: [score]}."""
        stage = {}
        for prompt, score in zip(prompts, np.asarray(scores, dtype=np.float64).tolist(), strict=True):
            stage.setdefault(prompt, []).append(score)
        statistics = {}
        for prompt, own in stage.items():
            pool = np.concatenate([*(past[prompt] for past in self._stages if prompt in past), own])
            statistics[prompt] = pool.mean(), pool.std(ddof=1) if len(pool) > 1 else 0.0
        return statistics, stage

    def state(self):
        """Plain JSON: a list of stages, oldest first, each {prompt: [score, …]}."""
        return self._stages

    @classmethod
    def from_state(cls, state, window):
        """The history that an earlier stage's state() holds, cut to the last `window` stages."""
        history = cls(window)
        history._stages = list(state)[-window:] if window else []
        return history


def standardise(prompts, scores, statistics):
    """(r - mean) / (std + 1e-8) of scores (N,) by their prompts' statistics, {prompt: (mean, std)} -> float64 (N,)."""
    mean, std = np.array([statistics[prompt] for prompt in prompts]).reshape(-1, 2).T
    return (np.asarray(scores, dtype=np.float64) - mean) / (std + 1e-8)
