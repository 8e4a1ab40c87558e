"""What the benchmark measures of a run: what it has spent, and how well it does on the evaluation's images."""

from ..evaluate import before_after
from ..evaluate.measures import feature_distance
from ..rewards import clip_of, user_function
from ..run import metrics, processes
from ..run.prompts import read_prompts
from ..shapes.variety import open_entropy
from .designs import LADDER

FIGURES = ("success", "by_prompt", "reward", "diversity", "entropy")  # each with _train and with _test


def spent(place, config):
    """{column: value} from the metrics.jsonl of a Run, up to and with stage config.stage but for the stage's own KL.

    forwards: passes of the denoiser, the compute of a run; a backward pass counts as two.
    """
    lines = [line for line in metrics.read(place.metrics) if line["stage"] <= config.stage]
    of = {step: [line for line in lines if line["step"] == step] for step in ("select", "train")}
    fused = [line for line in lines if line["step"] == "fuse"]
    trained = sum(line["perf/unet_evals"] - line.get("perf/unet_evals_base", 0) for line in of["train"])
    sampled = sum(line.get("perf/unet_evals", 0) for line in lines) - trained
    return {
        "queries": max(line.get("reward/queries", 0) for line in lines),
        "updates": sum(line["train/updates"] for line in of["train"]),
        "kept": sum(line["fuse/kept" if fused else "select/kept"] for line in fused or of["select"]),
        "unet_evals": sampled + trained,
        "forwards": sampled + 3 * trained,
        "approx_kl": of["train"][-1]["policy/approx_kl"],
        "seconds": round(sum(line["time_s"] for line in lines), 1),
    }


def measure(config, checkpoint, loaded, success):
    """{figure: value} of a checkpoint folder (None: the base model) on the fixed evaluation noise: FIGURES.

    success: a function of shapes.ladder. by_prompt: its mean for every prompt of the list, as text.
    """
    lists = {"train": read_prompts(config.prompts.train), "test": read_prompts(config.prompts.test)}
    images = before_after.generate(loaded.evaluating(), lists, checkpoint, config.exp_name)
    count, values = config.evaluate.images_per_prompt, {}
    for part, prompts in lists.items():
        own, repeated = images[part], [prompt for prompt in prompts for _ in range(count)]
        right = user_function(LADDER + success)(own, repeated).reshape(-1, count).mean(1)
        with loaded.scoring() as reward:
            clip = clip_of(reward, config, processes.device())
            features = clip.features(own).cpu().numpy().reshape(len(prompts), count, -1)
            scores = reward.score(own, repeated)[0]
        by_prompt = " ".join(f"{value:.4f}" for value in right)
        variety = float(feature_distance(features)), open_entropy(own, count)
        found = float(right.mean()), by_prompt, float(scores.mean()), *variety
        values |= {f"{name}_{part}": value for name, value in zip(FIGURES, found, strict=True)}
    return values
