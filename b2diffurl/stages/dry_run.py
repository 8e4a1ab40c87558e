"""What a run will take, before it: `bash run_process.sh --dry-run [--config.x.y=value ...]`. Nothing is written."""

import statistics

from ..bench import rates
from ..credit import most_chosen
from ..families import lora
from ..losses import ALGORITHMS, refers_to_base
from ..models import Models
from ..plan import METHODS, queries
from ..run import metrics
from ..run.command import run_main
from ..run.folder import Run
from ..run.prompts import read_prompts
from ..update import count_updates, update_size
from .targets import evaluations

BUDGET = 3.0  # seconds for each measurement
FEW = 4  # updates per stage, at most; the selection seldom keeps more than half of what it may


def main(config):
    """Print stages, images, reward queries, and, from a short measurement here, disk, memory and time."""
    loaded, plans = Models(config), rates.stage_plans(config)
    sampling, latent, pictures = rates.measure_sampling(loaded, None, BUDGET)
    scoring = rates.measure_scoring(loaded, pictures, BUDGET)
    algorithm, epochs = config.train.algorithm, config.train.num_epochs  # measuring sets the algorithm
    asks_base = ALGORITHMS[algorithm].pretrained or refers_to_base(config.train)
    training = rates.measure_training(loaded, None, BUDGET)
    epochs = 1 if ALGORITHMS[algorithm].on_policy else epochs
    images = config.sample.groups * plans[0].images
    transitions = epochs * config.sample.groups * statistics.mean(trained(config, plan) for plan in plans)
    seconds = [images / sampling["per_s"], images / scoring["per_s"], transitions / training["per_s"]]
    if asks_base:
        seconds[2] += transitions / epochs * sampling["seconds_per_step"]
    fused = queries(config) - images
    sizes = rates.sizes(config, latent, pictures[0])
    disk = stored(config, images + 2 * fused, sizes, lora.parameters(loaded.family.denoiser).values())
    before_after = 2 * config.evaluate.images_per_prompt * len(prompts(config))
    peaks = [phase["peak_bytes"] for phase in (sampling, scoring, training) if phase["peak_bytes"]]
    steps = config.evaluate.num_steps or config.sample.num_steps
    asked = statistics.mean(evaluations(config, plan) for plan in plans)
    seconds.append(fused * (asked * sampling["seconds_per_step"] + 1 / scoring["per_s"]))
    total = len(plans) * sum(seconds) + before_after * steps * sampling["seconds_per_step"]
    print("\n".join([
        f"run        {Run(config).folder}: {config.method}, {algorithm}, {config.reward.name}",
        f"stages     {len(plans)} of {images} images{f' and {fused} fused ones' if fused else ''}; "
        f"{len(plans) * (images + fused):,} reward queries in all",
        f"updates    {said_updates(config)}",
        f"evaluation {before_after} images",
        f"disk       {size(sum(disk.values()))} per stage, {size(at_once(config, disk))} at most at one time "
        "(config.keep)",
        f"memory     {size(max(peaks))} here with batches of {sampling['batch']} and {training['batch']}"
        if peaks else "memory     not known here",
        f"time       sample {seconds[0]:.0f} s, select {seconds[1]:.0f} s, train {seconds[2]:.0f} s or less"
        f"{f', fuse {seconds[3]:.0f} s' if fused else ''} per stage; "
        f"{metrics.duration(total)} or less in all by one process, without loading",
        "nothing was written",
    ]))  # fmt: skip


def stored(config, images, sizes, lora):
    """{what of config.keep, or "": always: bytes that a stage leaves}; lora: its parameters, float32 in the files."""
    weights = 4 * sum(own.numel() for own in lora) * (2 if config.train.ema_decay else 1)
    state = weights + 4 * sum(own.numel() for own in lora)  # AdamW's two moments, and the average
    return {
        "images": images * sizes["picture_bytes"],
        "trajectories": images * (sizes["stored_bytes_per_image"] - sizes["picture_bytes"]),
        "optimiser": weights + 2 * state,  # checkpoint_0, and the state of checkpoint_1
        "": weights,
    }


def at_once(config, disk):
    """Bytes on the disk at most: what config.keep keeps, and the stage at work."""
    stages, keep = config.schedule.stage_count, {"": 0, **config.keep}
    return sum(count * (min(stages, keep[name] + 1) if keep[name] else stages) for name, count in disk.items())


def said_updates(config):
    """How many updates a stage makes at most, in words; with fewer than a few a run hardly moves."""
    samples = sum(nodes for nodes, _ in most_chosen(config)) // (
        2 if ALGORITHMS[config.train.algorithm].preference else 1
    )
    most = count_updates(config.train, samples)[config.train.accumulate_over]
    few = "; that is few: lower config.train.trajectories_per_update" if most < FEW else ""
    return f"at most {most} per stage, of {update_size(config.train)} samples{few}"


def trained(config, plan):
    """Transitions per group and epoch: the paper's selection takes at most the best and the worst of a group."""
    count = len(plan.transitions.step)
    flat = METHODS[config.method].branches and not config.schedule.forks
    credit = config.select.credit or ("contrast" if flat else "")
    return count * min(1, 2 / plan.images) if credit == "contrast" else count


def prompts(config):
    """All prompts of the evaluation, each once per list."""
    return [prompt for path in config.prompts.values() for prompt in dict.fromkeys(read_prompts(path))]


def size(count):
    """Bytes as people say them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


if __name__ == "__main__":
    run_main(main)
