"""What the pictures of a prompt list are like, beside their reward: diversity within prompts, Inception Score.

LPIPS and the Inception Score are torchmetrics'; they need weights that torchvision and torch-fidelity download.
"""

import itertools
import os
import warnings

import numpy as np
import torch

from ..errors import UserError

LPIPS_PAIRS = 64  # pairs of pictures per call
INCEPTION_IMAGES = 32  # pictures per call
SPLITS = 10  # of the Inception Score (Salimans et al., arXiv 1606.03498)


def feature_distance(features):
    """Mean cosine distance between the images of one prompt; features (prompts, images, D): 2 images or more, unit
    vectors.
    """
    count = features.shape[1]
    total = features.sum(1)
    mean_cosine = ((total**2).sum(1) - count) / (count * (count - 1))
    return float(1 - mean_cosine.mean())


class Quality:
    """The measures that config.evaluate asks for and that need a network of their own, loaded once.

    They are of what their own process gives them: the others may be anywhere, so nothing is waited for.
    """

    def __init__(self, config, device):
        self.device, self.lpips, self.inception = device, None, None
        if config.evaluate.lpips:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            with _weights("LPIPS", "evaluate.lpips"):
                self.lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", sync_on_compute=False).to(device)
        if config.evaluate.inception_score:
            from torchmetrics.image.inception import InceptionScore

            with _weights("the Inception Score", "evaluate.inception_score"):
                self.inception = InceptionScore(splits=SPLITS, sync_on_compute=False).to(device)

    def __call__(self, images, count):
        """PIL images of 64x64 pixels at least, `count` per prompt, in order -> {name: figure}."""
        values = {}
        if self.lpips is not None and count > 1:
            values["lpips"] = lpips_distance(self.lpips, images, count)
        if self.inception is not None:
            values["inception_score"], values["inception_score_std"] = inception_score(self.inception, images)
        return values


def lpips_distance(metric, images, count):
    """Mean LPIPS (AlexNet, Zhang et al., arXiv 1801.03924) over all pairs of images of one prompt, of 2 at least."""
    pairs = [
        (first + i, first + j)
        for first in range(0, len(images), count)
        for i, j in itertools.combinations(range(count), 2)
    ]
    metric.reset()
    for first in range(0, len(pairs), LPIPS_PAIRS):
        left, right = zip(*pairs[first : first + LPIPS_PAIRS], strict=True)
        sides = (_pixels([images[i] for i in side]).to(metric.device) / 127.5 - 1 for side in (left, right))
        metric.update(*sides)
    return metric.compute().item()


def inception_score(metric, images):
    """(mean, standard deviation) over SPLITS parts of the images, the parts drawn by a fixed seed.

    No score can be above the number of images in a part: compare lists of one size.
    """
    metric.reset()
    for first in range(0, len(images), INCEPTION_IMAGES):
        metric.update(_pixels(images[first : first + INCEPTION_IMAGES]).to(metric.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # torchmetrics cuts the parts from a random order
        mean, std = metric.compute()
    return mean.item(), std.nan_to_num().item()


def _pixels(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


class _weights(warnings.catch_warnings):
    """Loading a metric's network: quiet, weights only, and a UserError that names the switch if they cannot be had."""

    def __init__(self, what, setting):
        super().__init__(action="ignore")
        self.what, self.setting = what, setting

    def __enter__(self):
        self.before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # the downloads are .pth files: nothing in them may run
        return super().__enter__()

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if self.before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = self.before
        if isinstance(error, OSError):
            raise UserError(
                f"the weights of {self.what} cannot be downloaded ({error}): put them into "
                f"{torch.hub.get_dir()}/checkpoints, or leave it out with --config.{self.setting}=False"
            ) from None
