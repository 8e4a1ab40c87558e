"""How often a stage draws each prompt: config.sample.prompt_weights.

A group whose images are all right, or all wrong, has nothing to say. DAPO's dynamic sampling (Yu et al. 2025) throws
such groups away after paying for them; here prompts are drawn by the variance of their rewards, which is p (1 - p) for
rewards of 0 and 1.
"""

import numpy as np

KINDS = ("uniform", "variance")
FLOOR = 0.1  # the share of the draws that stays uniform, so that no prompt is lost from sight


def by_variance(prompts, history):
    """Probabilities (P,) of the prompts: FLOOR uniform, the rest by the variance of a prompt's rewards.

    history: [{prompt: [reward, …]}] of stages, oldest first. A prompt's variance is that of the latest stage that drew
    it; one that was never drawn counts as the one that varies most. Uniform where no prompt's rewards vary.
    """
    variances = np.array([_variance(prompt, history) for prompt in prompts])
    known = ~np.isnan(variances)
    variances[~known] = variances[known].max() if known.any() else 1.0
    total = variances.sum()
    shares = variances / total if total > 0 else np.full(len(prompts), 1 / len(prompts))
    return FLOOR / len(prompts) + (1 - FLOOR) * shares


def _variance(prompt, history):
    """That of the prompt's rewards in the latest stage that drew it; nan where none did."""
    return next((np.var(stage[prompt]) for stage in reversed(history) if prompt in stage), np.nan)
