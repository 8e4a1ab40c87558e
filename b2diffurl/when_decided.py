"""When in the denoising is the outcome decided? Reward variance within and between branch groups, by split step.

`python -m b2diffurl.when_decided --config config/stage_process.py:shapes --out DIR [--checkpoint DIR]` writes
when_decided.json and when_decided.png into DIR.
"""

import os
import pathlib

import numpy as np
from PIL import Image

from . import rollout
from .errors import UserError
from .guidance import to_device
from .models import Models
from .noise import draw_prompts
from .plan import Plan
from .run import storage
from .run.command import run_main
from .run.prompts import read_prompts
from .shapes.oracle import verdicts

GUIDANCE = (2.0, 5.0)


def main(config, out, checkpoint):
    """Branch config.sample.groups groups at every second step, at two guidance scales, by the base model or a LoRA.

    Raises UserError for groups of one image, which have no variance.
    """
    if config.sample.branches < 2:
        raise UserError(f"config.sample.branches={config.sample.branches}: must be at least 2, to vary within a group")
    loaded, out = Models(config), pathlib.Path(out)
    prompts = read_prompts(config.prompts.train)
    chosen = draw_prompts(config.evaluate.seed, "splits", len(prompts), config.sample.groups)
    own, rows = [prompts[index] for index in chosen for _ in range(config.sample.branches)], []
    for config.sample.guidance_scale in GUIDANCE:
        policy = loaded.policy(checkpoint or None)
        for left in range(config.sample.num_steps, 0, -2):
            images = branch(config, policy, [prompts[index] for index in chosen], left)
            rows.append({"guidance": config.sample.guidance_scale, "steps_left": left})
            with loaded.scoring() as reward:
                scores = reward.score(images, own)[0].reshape(config.sample.groups, -1)
            rows[-1]["reward"] = split_variance(scores, own)
            right = verdicts(images, own) if config.evaluate.oracle else None
            if right is not None:
                rows[-1]["oracle"] = split_variance(right.reshape(config.sample.groups, -1), own)
            print(rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    storage.write_json(
        out / "when_decided.json", {"groups": config.sample.groups, "checkpoint": checkpoint, "rows": rows}
    )
    draw(rows, out / "when_decided.png")


def branch(config, policy, prompts, left):
    """PIL images of one group per prompt that branches with `left` steps to go.

    The noise is the evaluation's, never training's.
    """
    steps, images = config.sample.num_steps, []
    plan = Plan(steps, steps - left, 1, ((steps - left, config.sample.branches),))
    seeds = plan.seeds(config.evaluate.seed, "splits", range(len(prompts)))

    def on_batch(first, latents):
        images.extend(Image.fromarray(picture.numpy()) for picture in policy.family.decode(latents).cpu())

    cond = to_device(policy.family.embed(prompts), policy.device)
    rollout.sample(policy, plan, cond, seeds, config.sample.batch_size, on_batch)
    return images


def split_variance(values, prompts):
    """Unbiased variance components of values (G, K): within groups, and between the groups of one prompt.

    prompts: G·K strings. The variance of a prompt's images is their sum; 0 where no prompt has two groups. A negative
    estimate of the second, which noise can give, counts as 0.
    """
    within, means = float(values.var(axis=1, ddof=1).mean()), values.mean(1)
    own = np.array(prompts[:: values.shape[1]])
    distinct = np.unique(own)
    squares = sum(((means[own == prompt] - means[own == prompt].mean()) ** 2).sum() for prompt in distinct)
    freedom = len(own) - len(distinct)
    between = squares / freedom - within / values.shape[1] if freedom else 0.0
    return {"within": within, "between_groups": max(0.0, float(between))}


def draw(rows, path):
    """The share of a prompt's reward variance that is still open when the groups branch, by steps left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    kinds = [kind for kind in ("reward", "oracle") if kind in rows[0]]
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for guidance in sorted({row["guidance"] for row in rows}):
            own = [row for row in rows if row["guidance"] == guidance]
            open_share = [r[kind]["within"] / max(1e-12, r[kind]["within"] + r[kind]["between_groups"]) for r in own]
            axes.plot([row["steps_left"] for row in own], open_share, marker=".", label=f"guidance {guidance:g}")
        axes.set(title=f"{kind}: variance within groups / of one prompt", xlabel="steps left when the group branches")
        axes.set_ylim(0, 1)
        axes.legend()
    aside = path.with_name("when_decided.tmp.png")
    FigureCanvasAgg(figure).print_png(aside)
    os.replace(aside, path)


if __name__ == "__main__":
    run_main(main, out=None, checkpoint="")
