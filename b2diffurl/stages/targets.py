"""D-Fusion's targets: which reference for which base, and the base denoised again with the reference fused in."""

import typing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from .. import fusion
from ..errors import UserError
from ..guidance import take, to_device
from ..noise import stream_noise
from ..plan import stage_plan
from ..run.prompts import read_metadata
from ..selection import select_pairs
from ..words import thresholds


def pairs_of(config, scores):
    """D-Fusion's pairs [(reference, base)], rows of the stage's scores, of which group g has K from g·K on."""
    branches = config.sample.branches
    rewards = np.array([row["reward"] for row in scores]).reshape(-1, branches)
    return [
        (scores[group * branches + best], scores[group * branches + worst])
        for group, best, worst in select_pairs(rewards)
    ]


def place(config, row):
    """The number of a scored image in its stage."""
    return row["group"] * config.sample.branches + row["branch"]


def word_thresholds(config, family, prompts):
    """The thresholds (P, L) of fusion.region for the prompts. UserError where a prompt has no word to fuse."""
    given = read_metadata(config.prompts.train)
    spans = {prompt: family.token_spans(prompt) for prompt in prompts}
    own = config.fusion.threshold
    return torch.tensor([thresholds(prompt, spans[prompt], given.get(prompt, {}), own) for prompt in prompts])


def evaluations(config, plan):
    """Predictions that a target costs: its own and the reference's at every step, the plain policy's where fused."""
    return 2 * (plan.steps - plan.start) + plan.steps - max(plan.start, config.fusion.first_step)


class Pairs(typing.NamedTuple):
    """n pairs and what their targets are made from."""

    rows: list  # [(reference, base)], rows of scores.json
    cond: dict  # Conditioning (n, ...)
    words: torch.Tensor  # (n, L) of word_thresholds
    references: dict  # of read_images: their first states
    bases: dict  # of read_images


def make_targets(config, policy, pairs, folder):
    """Denoise the pairs' targets, write their pictures and masks -> tensors (n, ...) by name.

    states and log_prob: of the pair's plan; kl: of the fused from the plain transition by step, in nats; mask_share.
    UserError where latents are not finite.
    """
    plan, found = stage_plan(config), {}
    steps, trained = range(plan.start, plan.steps), plan.stored(1)
    interval, saving = (steps, max(plan.start, config.fusion.first_step)), []
    with ThreadPoolExecutor(4) as pool:  # pictures are written while the next targets are denoised
        for chunk in torch.arange(len(pairs.rows)).split(max(1, config.sample.batch_size // 2)):
            rows = [pairs.rows[i] for i in chunk.tolist()]
            fused = fusion.Fusion(
                policy.family, policy.denoiser, pairs.words[chunk].to(policy.device), config.fusion.mask
            )
            noise = [_noise(policy, own, len(steps)) for own in zip(*rows, strict=True)]
            first = [own["states"][chunk, 0].to(policy.device) for own in (pairs.references, pairs.bases)]
            cond = to_device(take(pairs.cond, chunk), policy.device)
            states, log_prob, kl, mask = fusion.denoise(policy, fused, first, noise, cond, interval)
            if not torch.isfinite(states[-1]).all():
                raise UserError(f"stage {config.stage}: the targets' latents are not finite; nothing was written")
            pictures = policy.family.decode(states[-1]).cpu().numpy(), mask.cpu().numpy()
            saving.append(pool.submit(_write_pictures, *pictures, rows, folder))
            base, target = pairs.bases["states"][chunk], torch.stack(states[1 : trained + 1], 1).cpu()
            log_prob = torch.stack(log_prob[:trained], 1).cpu()
            own = {
                "states": torch.cat([base[:, :1], base[:, :1], base[:, 1:], target], 1),
                "log_prob": torch.cat([pairs.bases["log_prob"][chunk], log_prob], 1),
                "kl": torch.stack(kl, 1).cpu() * target[0, 0].numel(),
                "mask_share": mask.mean(1).cpu(),
            }
            for name, tensor in own.items():
                found.setdefault(name, []).append(tensor)
    for future in saving:
        future.result()
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def _noise(policy, rows, steps):
    """The step noise (B, steps, ...) with which the images of the rows were sampled, from the interval's start on."""
    noise = torch.stack([stream_noise(row["seed"], steps, policy.family.latent_shape) for row in rows])
    return noise.to(policy.device)


def _write_pictures(pictures, masks, rows, folder):
    """Write the targets (B, H, W, 3) uint8 under their bases' names, and beside them the masks (B, side²) in [0, 1]."""
    side = round(masks.shape[1] ** 0.5)
    for (_, base), picture, mask in zip(rows, pictures, (255 * masks).round().astype(np.uint8), strict=True):
        Image.fromarray(picture).save(folder / base["image"])
        Image.fromarray(mask.reshape(side, side)).save(folder / mask_of(base))


def mask_of(base):
    """The name of the picture of a target's mask: over the fused steps, how often each place was fused."""
    return base["image"].replace(".png", "_mask.png")
