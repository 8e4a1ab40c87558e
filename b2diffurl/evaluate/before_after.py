"""Before and after: the base model and a checkpoint on the same prompts with the same fixed noise.

`python -m b2diffurl.evaluate --config config/stage_process.py:PRESET --checkpoint DIR --out DIR [--prompts FILE]
[--images_per_prompt N] [--batch_size N]`. Without --prompts: the configuration's train and held-out lists.
"""

import hashlib
import os
import pathlib

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from ..guidance import take, to_device
from ..models import Models
from ..noise import stream_noise, stream_seed
from ..rewards import clip_of
from ..rewards.answers import forget
from ..rollout import denoise
from ..run import processes, storage
from ..run.folder import Run, start_log
from ..run.prompts import read_metadata, read_prompts
from ..shapes.oracle import verdicts
from . import contact_sheet
from .measures import Quality, feature_distance

RESAMPLES = 10_000
MEND = "delete it, and evaluate again"  # where an eval.json is broken
MATTERS = ("pretrained", "sample", "reward", "evaluate")  # the settings that an evaluation depends on
NO_MATTER = (
    ("sample", "batch_size"), ("sample", "groups"), ("sample", "branches"), ("sample", "prompt_weights"),
    ("sample", "prefix"), ("reward", "batch_size"), ("reward", "timeout"),
)  # fmt: skip


def main(config, checkpoint, out, prompts="", loaded=None):
    """Write eval.json and before_after.png into `out`, and print the table; what is there already is only printed.

    prompts: a prompt file, the configuration's train and held-out lists unless given.
    loaded: the Models of a whole run, the evaluation's own unless given.
    """
    out = pathlib.Path(out)
    if not pathlib.Path(checkpoint, "pytorch_lora_weights.safetensors").is_file():
        raise UserError(f"--checkpoint {checkpoint}: it holds no pytorch_lora_weights.safetensors")
    paths = {"train": config.prompts.train, "held-out": config.prompts.test}
    if prompts:
        config.prompts.train = config.prompts.test = prompts
        paths = {pathlib.Path(prompts).stem: prompts}
    lists = {name: list(dict.fromkeys(read_prompts(path))) for name, path in paths.items()}  # the same noise
    settings = _settings(config, checkpoint, lists)
    metadata = {name: more for name, path in paths.items() if (more := read_metadata(path))}
    settings |= {"metadata": metadata} if metadata else {}
    say = _sayer(config, out)
    stored = storage.read_json(out / "eval.json", mend=MEND) if (out / "eval.json").exists() else {}
    if processes.first(stored.get("settings") == settings and (out / "before_after.png").exists()):
        say(table(stored["results"]))
        return
    out.mkdir(parents=True, exist_ok=True)
    loaded, count = loaded or Models(config), config.evaluate.images_per_prompt
    results, pictures, measures, first = [], {}, [], processes.rank() == 0

    def load():
        with loaded.scoring() as reward:
            if first:  # the others sample and score a share
                clip = clip_of(reward, config, processes.device())
                measures.extend([clip, Quality(config, processes.device())])

    processes.agree(load)
    loaded.family.embed([prompt for own in lists.values() for prompt in own])  # before the denoiser is there
    evaluated = loaded.evaluating()
    for model, folder in (("before", None), ("after", checkpoint)):
        images = generate(evaluated, lists, folder, model)
        with loaded.scoring() as reward, reward.answers_in(out):
            scores = {name: score(reward, own, images[name], count) for name, own in lists.items()}
            for name, own in lists.items() if first else ():  # in here: clip may be a term, and waits elsewhere outside
                clip, quality = measures
                figures = measure(config, scores[name], clip, own, images[name]) | quality(images[name], count)
                results.append({"model": model, "prompts": name, **figures})
                starts = [i * count for i in contact_sheet.shown(own)]
                pictures[model, name] = [images[name][i : i + min(count, contact_sheet.COLUMNS)] for i in starts]
        del images
    if first:
        contact_sheet.draw(lists, pictures).save(out / "before_after.tmp.png")
        os.replace(out / "before_after.tmp.png", out / "before_after.png")
        storage.write_json(out / "eval.json", {"settings": settings, "results": results})
        forget(out)
        say(table(results))
    processes.barrier()


def _sayer(config, out):
    """What prints the table, once: into the log too where `out` is the run's folder."""
    if out.resolve() == Run(config).folder.resolve():
        return start_log(Run(config)).info
    return print if processes.rank() == 0 else lambda text: None


def _settings(config, checkpoint, lists):
    """Everything that decides the results; how many images a stage has, and batch sizes, do not."""
    weights = pathlib.Path(checkpoint, "pytorch_lora_weights.safetensors").read_bytes()
    chosen = {name: config[name].to_dict() for name in MATTERS}
    for own, name in NO_MATTER:
        del chosen[own][name]
    return {
        "checkpoint": str(checkpoint), "sha256": hashlib.sha256(weights).hexdigest(), "lists": lists,
        "mixed_precision": config.mixed_precision, "allow_tf32": config.allow_tf32, **chosen,
    }  # fmt: skip


@torch.no_grad()
def generate(loaded, lists, checkpoint, label):
    """{list name: PIL images, evaluate.images_per_prompt per prompt}, by the base model or with a checkpoint's LoRA.

    All processes sample a share, and all have all images.

    The noise of an image depends on evaluate.seed, its prompt and its number alone.
    """
    from tqdm import tqdm

    config = loaded.config
    names, count = list(lists), config.evaluate.images_per_prompt
    distinct = list(dict.fromkeys(p for name in names for p in lists[name]))
    embeds, policy = loaded.family.embed(distinct), loaded.policy(checkpoint)
    wanted = [(name, prompt, i) for name in names for prompt in lists[name] for i in range(count)]
    images = {name: [] for name in names}
    steps = config.sample.num_steps
    mine = wanted[processes.share(len(wanted))]
    with policy.together():
        firsts = range(0, len(mine), config.sample.batch_size)
        for first in tqdm(firsts, desc=f"images {label}", leave=False, disable=None):
            batch = mine[first : first + config.sample.batch_size]
            seeds = [stream_seed(config.evaluate.seed, "evaluation", prompt, i) for _, prompt, i in batch]
            noise = torch.stack([stream_noise(seed, steps + 1, loaded.family.latent_shape) for seed in seeds])
            noise = noise.to(policy.device, non_blocking=True)
            cond = to_device(take(embeds, [distinct.index(prompt) for _, prompt, _ in batch]), policy.device)
            states, _ = denoise(policy, policy.initial(noise[:, 0]), cond, noise[:, 1:], range(steps))
            for (name, _, _), picture in zip(batch, loaded.family.decode(states[-1]).cpu(), strict=True):
                images[name].append(Image.fromarray(picture.numpy()))
    found = processes.gather(images)
    return {name: [image for own in found for image in own[name]] for name in names}


def score(reward, prompts, images, count):
    """Rewards of one list's images, `count` per prompt, as Reward.score has them; every process scores a share."""
    share, repeated = processes.share(len(images)), [prompt for prompt in prompts for _ in range(count)]
    mine = images[share], repeated[share]
    found = [own for own in processes.agree(lambda: reward.score(*mine) if mine[0] else None) if own]
    terms = {name: np.concatenate([own[name] for _, own in found]) for name in found[0][1]}
    return np.concatenate([total for total, _ in found]), terms


def measure(config, scores, clip, prompts, images):
    """Figures of one list's images, evaluate.images_per_prompt per prompt; intervals are resampled over prompts.

    Reward and its terms (scores: of `score`), CLIPScore, diversity, and oracle alignment where config.evaluate asks.
    """
    count = config.evaluate.images_per_prompt
    repeated = [prompt for prompt in prompts for _ in range(count)]
    total, terms = scores
    values = {"images": len(images), "images_sha256": hashlib.sha256(b"".join(i.tobytes() for i in images)).hexdigest()}
    values |= _with_interval("reward", total.reshape(-1, count))
    if set(terms) != {"clip"}:
        terms = terms if "clip" in terms else {"clip": clip(images, repeated).numpy(), **terms}
        values |= {name: term.mean() for name, term in terms.items()}
    right = verdicts(images, repeated) if config.evaluate.oracle else None
    if right is not None:
        right = right.reshape(-1, count)
        values |= _with_interval("oracle", right)
        values["oracle_by_prompt"] = dict(zip(prompts, right.mean(1).tolist(), strict=True))
    if count > 1:
        features = clip.features(images).cpu().numpy()
        values["diversity"] = feature_distance(features.reshape(len(prompts), count, -1))
    return {name: float(v) if isinstance(v, np.floating) else v for name, v in values.items()}


def _with_interval(name, per_image):
    found = {name: per_image.mean()}
    return found | {f"{name}_interval": bootstrap_interval(per_image.mean(1))} if len(per_image) > 1 else found


def bootstrap_interval(per_prompt):
    """95 % percentile interval of the mean, resampling prompts: [low, high]."""
    rng = np.random.default_rng(0)
    means = per_prompt[rng.integers(len(per_prompt), size=(RESAMPLES, len(per_prompt)))].mean(1)
    return np.quantile(means, [0.025, 0.975]).tolist()


def table(results):
    """The before/after table as text; a column for every figure that there is."""
    known, suffixes = ["images_sha256", "model", "prompts", "images"], ("_interval", "_std", "_by_prompt")
    names = list(dict.fromkeys(n for r in results for n in r if n not in known and not n.endswith(suffixes)))
    heads = {"oracle": "oracle alignment", "inception_score": "Inception Score", "lpips": "LPIPS"}
    lines = [["prompts", "model", "images", *(heads.get(name, name) for name in names)]]
    for r in sorted(results, key=lambda r: [*dict.fromkeys(r["prompts"] for r in results)].index(r["prompts"])):
        lines.append([r["prompts"], r["model"], str(r["images"]), *(_cell(r, name) for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(row, name):
    if name not in row:
        return "-"
    if f"{name}_interval" in row:
        return "{:.3f} [{:.3f}, {:.3f}]".format(row[name], *row[f"{name}_interval"])
    return f"{row[name]:.4f}"
