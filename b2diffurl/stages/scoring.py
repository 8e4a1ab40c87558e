"""Scoring a stage's pictures, for run_select.py and run_fuse.py: every process its own share of them."""

import concurrent.futures

import numpy as np
from PIL import Image

from ..errors import UserError
from ..run import processes
from ..shapes.oracle import verdicts


def score(config, reward, paths, prompts, beside=None):
    """Rewards (N,), {term: rewards (N,)}, the oracle's verdicts (N,) or None, and what `beside` found.

    paths, prompts: of N pictures. The verdicts are those of config.evaluate.oracle, where all prompts are of the
    oracle's world. beside(images, share): of each process's own images, its slice of the N -> anything; a list of them.
    """
    share = processes.share(len(paths))
    own = prompts[share]

    def work():
        with concurrent.futures.ThreadPoolExecutor() as pool:  # decoding a large PNG takes longer than scoring it
            images = [*pool.map(read_picture, paths[share])]
        return {
            "scores": reward.score(images, own) if images else None,
            "verdicts": verdicts(images, own) if config.evaluate.oracle and images else None,
            "beside": beside(images, share) if beside and images else None,
        }

    found = processes.agree(work)
    scores, right, others = ([own[name] for own in found if own[name] is not None] for name in found[0])
    terms = {name: np.concatenate([own[name] for _, own in scores]) for name in scores[0][1]}
    right = np.concatenate(right) if sum(map(len, right)) == len(paths) else None
    return np.concatenate([total for total, _ in scores]), terms, right, others


def read_picture(path):
    """A PNG as an RGB image. Raises UserError where it cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): delete the stage's folder and run it again") from None
