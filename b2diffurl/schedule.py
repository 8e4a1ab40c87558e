"""Backward progressive training: which denoising steps a stage trains (paper section 4.1).

Denoising step indices run from 0 (pure noise) to T-1 (last). An interval is (start, stop), half open.
"""

KINDS = ("growing", "constant")


def interval_length(stage, stage_count, left, right):
    """Trained steps s(i) = left + floor(i (right - left + 1) / N) of stage i out of N: from left up to right.

    Integer arithmetic, so that no rounding moves a boundary. Raises ValueError for a stage outside 0..N-1 or for
    bounds that are not 1 <= left <= right.
    """
    if not 0 <= stage < stage_count:
        raise ValueError(f"stage must be in 0..{stage_count - 1}, not {stage}")
    if not 1 <= left <= right:
        raise ValueError(f"need 1 <= left <= right, not left={left}, right={right}")
    return left + stage * (right - left + 1) // stage_count


def interval(kind, stage, stage_count, left, right, num_steps):
    """(start, stop) of the steps that a stage trains, within num_steps denoising steps.

    growing: the paper's suffix, s(i) long. constant: the last `right` steps in every stage (no progressive training).
    Another kind of window is one more branch here; sampling and training take any (start, stop).
    """
    if right > num_steps:
        raise ValueError(f"schedule.right={right} is longer than the {num_steps} denoising steps")
    if kind == "growing":
        return num_steps - interval_length(stage, stage_count, left, right), num_steps
    if kind == "constant":
        return num_steps - right, num_steps
    raise ValueError(f"unknown schedule.kind {kind!r}: {' or '.join(KINDS)}")
