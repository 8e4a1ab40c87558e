"""How much each denoising step's loss counts in an update.

The gradient of a transition's log-density at the denoiser's output is g ε: ε the step's standard normal noise, g the
kernel's gain, by how many standard deviations the mean moves with the output. So the steps with the smallest noise,
which decide the least about the picture, give most of the gradient, whatever the reward says of them. A weight of 1/g
gives every step the same gradient at the denoiser's output; it is the idea of TempFlow-GRPO's noise-aware weights
(arXiv 2508.04324) and of GRPO-Guard's (arXiv 2510.22319), in a form that any Gaussian kernel has.
"""

KINDS = ("one", "inverse_gain")


def step_weights(gain, steps, kind):
    """Weights (n,) float32 of the transitions whose steps (n,) are given, with a mean of 1; None where all are 1.

    gain: from a step to the kernel's gain there. kind: one of KINDS; "one" is the paper's.
    """
    if kind == "one":
        return None
    inverse = steps.new_zeros(int(steps.max()) + 1).float()
    for step in steps.unique().tolist():
        inverse[step] = 1 / gain(step)
    return inverse[steps] / inverse[steps].mean()
