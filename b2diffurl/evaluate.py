"""Before and after: the base model and a checkpoint on the same prompts with the same fixed noise.

`python -m b2diffurl.evaluate --config config/stage_process.py:PRESET --checkpoint DIR --out DIR`
"""

import hashlib
import os
import pathlib

import numpy as np
import torch
from PIL import Image, ImageDraw

from . import files, models
from .configuration import UserError, read_prompts, run_main
from .noise import stream_noise, stream_seed
from .rewards import load_clip, load_reward, score
from .shapes.oracle import verdicts

RESAMPLES = 10_000
MATTERS = ("pretrained", "sample", "reward", "evaluate")  # the settings that an evaluation depends on


def main(config, checkpoint, out):
    """Write eval.json and before_after.png into `out`, and print the table; what is there already is only printed."""
    out = pathlib.Path(out)
    if not pathlib.Path(checkpoint, "pytorch_lora_weights.safetensors").is_file():
        raise UserError(f"--checkpoint {checkpoint}: it holds no pytorch_lora_weights.safetensors")
    lists = {"train": read_prompts(config.prompts.train), "held-out": read_prompts(config.prompts.test)}
    weights = pathlib.Path(checkpoint, "pytorch_lora_weights.safetensors").read_bytes()
    settings = {
        "checkpoint": str(checkpoint), "sha256": hashlib.sha256(weights).hexdigest(), "lists": lists,
        "mixed_precision": config.mixed_precision, "allow_tf32": config.allow_tf32,
        **{name: config[name].to_dict() for name in MATTERS},
    }  # fmt: skip
    log = files.start_log(files.Run(config))
    if (out / "eval.json").exists():
        stored = files.read_json(out / "eval.json", "the evaluation")
        if stored.get("settings") == settings:
            log.info(table(stored["results"]))
            return
    out.mkdir(parents=True, exist_ok=True)
    models.prepare(config)
    reward = load_reward(config, models.device())
    clip = reward if config.reward.name == "clip" else load_clip(config, models.device())
    results, pictures = [], {}
    for model, folder in (("before", None), ("after", checkpoint)):
        images = generate(config, lists, folder, model)
        for name, prompts in lists.items():
            results.append({"model": model, "prompts": name, **measure(config, reward, clip, prompts, images[name])})
            pictures[model, name] = images[name]
    side_by_side(config, lists, pictures).save(out / "before_after.tmp.png")
    os.replace(out / "before_after.tmp.png", out / "before_after.png")
    files.write_json(out / "eval.json", {"settings": settings, "results": results})
    log.info(table(results))


@torch.no_grad()
def generate(config, lists, checkpoint, label):
    """{list name: PIL images, evaluate.images_per_prompt a prompt}, by the base model or with a checkpoint's LoRA.

    The noise of an image depends on evaluate.seed, its prompt and its number alone.
    """
    from tqdm import tqdm

    names, count = list(lists), config.evaluate.images_per_prompt
    distinct = list(dict.fromkeys(p for name in names for p in lists[name]))
    embeds = models.embed_prompts(config, [*distinct, ""])
    sampler, vae = models.load_sampler(config, embeds[-1:], checkpoint), models.load_vae(config)
    wanted = [(name, prompt, i) for name in names for prompt in lists[name] for i in range(count)]
    images = {name: [] for name in names}
    steps = config.sample.num_steps
    for first in tqdm(
        range(0, len(wanted), config.sample.batch_size), desc=f"images {label}", leave=False, disable=None
    ):
        batch = wanted[first : first + config.sample.batch_size]
        seeds = [stream_seed(config.evaluate.seed, "evaluation", prompt, i) for _, prompt, i in batch]
        noise = torch.stack([stream_noise(seed, steps + 1, sampler.latent_shape) for seed in seeds])
        own = embeds[[distinct.index(prompt) for _, prompt, _ in batch]].to(models.device())
        path, _ = sampler.denoise(sampler.initial(noise[:, 0]), own, noise[:, 1:], range(steps))
        for (name, _, _), picture in zip(batch, models.decode(vae, path[:, -1]), strict=True):
            images[name].append(Image.fromarray(picture.numpy()))
    return images


def measure(config, reward, clip, prompts, images):
    """Reward, its spread, diversity and, where asked for, oracle alignment; intervals are resampled over prompts."""
    count = config.evaluate.images_per_prompt
    repeated = [prompt for prompt in prompts for _ in range(count)]
    scores = score(reward, config, images, repeated).reshape(-1, count)
    values = {
        "images": len(images),
        "reward": scores.mean(),
        "reward_interval": bootstrap_interval(scores.mean(1)),
        "diversity": feature_distance(clip.features(images).float().cpu().numpy().reshape(len(prompts), count, -1)),
    }
    right = verdicts(images, repeated) if config.evaluate.oracle else None
    if right is not None:
        right = right.reshape(-1, count)
        values["oracle"] = right.mean()
        values["oracle_interval"] = bootstrap_interval(right.mean(1))
    return values


def feature_distance(features):
    """Mean cosine distance between the images of one prompt; features (prompts, images, D) are unit vectors."""
    count = features.shape[1]
    if count < 2:
        return 0.0
    total = features.sum(1)
    mean_cosine = ((total**2).sum(1) - count) / (count * (count - 1))
    return float(1 - mean_cosine.mean())


def bootstrap_interval(per_prompt):
    """95 % percentile interval of the mean, resampling prompts: [low, high]."""
    rng = np.random.default_rng(0)
    means = per_prompt[rng.integers(len(per_prompt), size=(RESAMPLES, len(per_prompt)))].mean(1)
    return np.quantile(means, [0.025, 0.975]).tolist()


def table(results):
    """The before/after table as text."""
    lines = ["prompts   model   images  reward                 oracle alignment       diversity"]
    for r in sorted(results, key=lambda r: r["prompts"], reverse=True):
        cells = [f"{r['prompts']:<9} {r['model']:<7} {r['images']:>6}"]
        for name in ("reward", "oracle"):
            if name in r:
                low, high = r[f"{name}_interval"]
                cells.append(f"{r[name]:.3f} [{low:.3f}, {high:.3f}]")
            else:
                cells.append(f"{'-':<20}")
        lines.append("   ".join([*cells, f"{r['diversity']:.4f}"]))
    return "\n".join(lines)


def side_by_side(config, lists, pictures, prompts=6, images=4, tile=96):
    """Contact sheet: a row a prompt, spread over the lists; its first images before (left) and after (right)."""
    rows = [(name, i) for name in lists for i in np.linspace(0, len(lists[name]) - 1, prompts).round().astype(int)]
    count = config.evaluate.images_per_prompt
    shown, label = min(images, count), 190
    sheet = Image.new("RGB", (label + 2 * shown * tile + 12, 20 + len(rows) * (tile + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for half, model in enumerate(("before", "after")):
        left = label + half * (shown * tile + 12)
        draw.text((left, 4), model, fill="black")
        for row, (name, i) in enumerate(rows):
            top = 20 + row * (tile + 4)
            draw.text((4, top + tile // 2 - 12), f"{name}\n{lists[name][i][:30]}", fill="black")
            for k, image in enumerate(pictures[model, name][i * count : i * count + shown]):
                smooth = Image.Resampling.LANCZOS if image.width > tile else Image.Resampling.NEAREST
                sheet.paste(image.resize((tile, tile), smooth), (left + k * tile, top))
    return sheet


if __name__ == "__main__":
    run_main(main, checkpoint=None, out=None)
