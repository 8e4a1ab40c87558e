"""The paper's claims, in miniature: methods x algorithms x seeds on `shapes`, at an equal budget of reward queries.

`python -m b2diffurl.study [--quick | --search] [--out DIR] [--rows ALGORITHM:METHOD ...] [--seeds N ...] [--set
NAME=VALUE ...]` writes results.csv, table.md and curves.png into DIR/quick, DIR/search or DIR/full. The same command
goes on where it was stopped; a run whose last stage is in results.csv is done.
"""

import collections
import concurrent.futures
import multiprocessing
import os
import re
import signal
import sys
import time
import typing

from .. import models
from ..errors import UserError
from ..evaluate import before_after
from ..rewards import clip_of
from ..run import lock, metrics, processes, storage
from ..run.command import parse
from ..run.config import read_prompts
from ..run.folder import Run, checkpoint
from ..shapes.variety import open_entropy
from ..stages import sample, select, train
from . import report


def prompt_lists(name):
    """The settings of a pair of prompt lists: the attribute prompts, three shapes for study and two for search."""
    return {f"prompts.{part}": f"prompts/shapes_{name}_{part}.json" for part in ("train", "test")}


OTHERS = ("ddpo_sf", "dpok", "dpo")
MEAN = {"train.log_prob": "mean", "train.clip_range": 1e-3}
LOSSES = {  # the losses compared, by what results.csv calls them; ddpo_is and ddpo_is_sum with all four methods
    "ddpo_is": {"train.algorithm": "ddpo_is", **MEAN},
    "ddpo_is_sum": {"train.algorithm": "ddpo_is", "train.log_prob": "sum", "train.clip_range": 0.2},
    **{name: {"train.algorithm": name, **MEAN} for name in OTHERS},
}
METHODS = ("ddpo", "ddpo_bpt", "ddpo_bs", "b2")
SIZES = {"sample.groups": 48, "evaluate.images_per_prompt": 16}
BUDGETS = {  # beside the shapes preset's settings, the same for every run
    "full": {"schedule.stage_count": 12, **SIZES, **prompt_lists("study")},
    "quick": {"schedule.stage_count": 4, "sample.groups": 12, "evaluate.images_per_prompt": 4, **prompt_lists("study")},
    "search": {"schedule.stage_count": 8, **SIZES, **prompt_lists("search")},
}
ROUNDS = {"ddpo_sf": 4}  # so many times the stages, of as much smaller size: on-policy means one update a stage
GRID = {  # the learning rate, and the algorithm's own coefficient where it has one
    "ddpo_is": [{"train.learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)],
    "ddpo_is_sum": [{"train.learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)],
    "ddpo_sf": [{"train.learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)],
    "dpok": [
        {"train.learning_rate": rate, "train.kl_weight": weight}
        for rate, weight in ((4e-3, 0.1), (8e-3, 0.1), (1.6e-2, 0.1), (8e-3, 0.01), (8e-3, 1))
    ],
    "dpo": [
        {"train.learning_rate": rate, "train.dpo_beta": beta}
        for rate, beta in ((4e-3, 1000), (8e-3, 1000), (1.6e-2, 1000), (8e-3, 100), (8e-3, 10000))
    ],
}
FINALISTS = {  # by (algorithm, method), the two places in GRID that were best on the search's first seed
    ("ddpo_is", "ddpo"): (3, 4), ("ddpo_is", "ddpo_bpt"): (5, 4), ("ddpo_is", "ddpo_bs"): (6, 5),
    ("ddpo_is", "b2"): (5, 6),
    ("ddpo_is_sum", "ddpo"): (1, 2), ("ddpo_is_sum", "ddpo_bpt"): (1, 2), ("ddpo_is_sum", "ddpo_bs"): (3, 2),
    ("ddpo_is_sum", "b2"): (3, 2),
    ("ddpo_sf", "ddpo"): (2, 1), ("ddpo_sf", "b2"): (1, 2), ("dpo", "ddpo"): (1, 0), ("dpo", "b2"): (1, 4),
}  # fmt: skip
CHOSEN = {  # by (algorithm, method), the place whose mean reward was best over all its seeds (dpok: the first's alone)
    ("ddpo_is", "ddpo"): 4, ("ddpo_is", "ddpo_bpt"): 4, ("ddpo_is", "ddpo_bs"): 5, ("ddpo_is", "b2"): 5,
    ("ddpo_is_sum", "ddpo"): 1, ("ddpo_is_sum", "ddpo_bpt"): 2, ("ddpo_is_sum", "ddpo_bs"): 2, ("ddpo_is_sum", "b2"): 3,
    ("ddpo_sf", "ddpo"): 1, ("ddpo_sf", "b2"): 2, ("dpok", "ddpo"): 3, ("dpok", "b2"): 3,
    ("dpo", "ddpo"): 0, ("dpo", "b2"): 1,
}  # fmt: skip


class Job(typing.NamedTuple):
    """A run of the matrix: everything in which it differs from the others."""

    algorithm: str  # a key of LOSSES
    method: str
    seed: int
    settings: tuple  # of (configuration field, value)

    def key(self):
        """What names the run in results.csv: (algorithm, method, settings, seed)."""
        told = ", ".join(f"{name.split('.')[-1]} {value}" for name, value in self.settings)
        return self.algorithm, self.method, told, self.seed


def matrix(kind, cells=(), seeds=(), changes=()):
    """The runs of a full | quick | search study; cells ("algorithm:method") and seeds: only these, or these instead.

    full: five seeds for the four methods of DDPO's loss with either clip, three for two of each other algorithm's.
    search: every setting of the grid for each of those cells on a seed of its own, then FINALISTS on two more (ddpo_is)
    or one. changes: (field, value) pairs that all runs get over their own.
    """

    def job(cell, seed, place):
        return Job(*cell, seed, tuple({**GRID[cell[0]][place], **dict(changes)}.items()))

    clips = ("ddpo_is",) if kind == "quick" else ("ddpo_is", "ddpo_is_sum")
    plain = [(loss, method) for loss in clips for method in METHODS]
    others = [(loss, method) for loss in OTHERS for method in ("ddpo", "b2")]
    if kind == "search":
        runs = [job(cell, 201, place) for cell in plain + others for place in range(len(GRID[cell[0]]))]
        finals = [(cell, place) for cell in FINALISTS for place in FINALISTS[cell]]
        runs += [job(cell, 202, place) for cell, place in finals]
        runs += [job(cell, 203, place) for cell, place in finals if cell[0] == "ddpo_is"]
    else:
        many, few = ((101, 102), (101,)) if kind == "quick" else (range(101, 106), range(101, 104))
        if kind == "quick":
            others = [cell for cell in others if cell[1] == "b2"]
        pairs = [(cell, seed) for seed in seeds or many for cell in plain]
        pairs += [(cell, seed) for seed in seeds or few for cell in others]
        runs = [job(cell, seed, CHOSEN[cell]) for cell, seed in pairs]
    return [run for run in runs if not cells or ":".join(run[:2]) in cells]


def configure(job, out, kind):
    """The shapes preset with a run's settings, all of them; the rest of the matrix differs from it in these alone."""
    budget, rounds = BUDGETS[kind], ROUNDS.get(job.algorithm, 1)
    settings = {
        **budget, "schedule.stage_count": budget["schedule.stage_count"] * rounds,
        "sample.groups": budget["sample.groups"] // rounds,
        "exp_name": re.sub(r"[^\w.]+", "_", " ".join(map(str, job.key()))), "save_path": str(out / "runs"),
        "method": job.method, "seed": job.seed, **LOSSES[job.algorithm],
        "keep.images": 1, "keep.trajectories": 1, "keep.optimiser": 2, **dict(job.settings),
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return parse(["study", "--config", "config/stage_process.py:shapes", *flags])[0]


def evaluated(config):
    """Whether a stage's result is evaluated: whenever 192 groups more, four of the preset's stages, and at the end."""
    end = config.stage == config.schedule.stage_count - 1
    return end or (config.stage + 1) * config.sample.groups % 192 == 0


def measure(config, checkpoint, loaded):
    """Train and held-out figures of a checkpoint (None: the base model) on the fixed evaluation noise."""
    lists = {"train": read_prompts(config.prompts.train), "test": read_prompts(config.prompts.test)}
    images = before_after.generate(config, loaded, lists, checkpoint, config.exp_name)
    values = {}
    for name, prompts in lists.items():
        with loaded.scoring() as reward:
            found = before_after.measure(
                config, reward, clip_of(reward, config, models.device()), prompts, images[name]
            )
        for key in ("reward", "oracle", "diversity"):
            values[f"{key}_{name}"] = found[key]
        values[f"entropy_{name}"] = open_entropy(images[name], config.evaluate.images_per_prompt)
    return values


def run(job, out, kind):
    """One run of the matrix, or what is left of it; -> its rows, one a stage."""
    config = configure(job, out, kind)
    stages, rows, loaded = config.schedule.stage_count, [], models.Models(config)
    for config.stage in range(stages):
        place = Run(config)
        if not (place.stage / "checkpoints").is_dir():
            for step in (sample, select, train):
                step.main(config, loaded=loaded)
        row = dict(zip(("algorithm", "method", "settings", "seed"), job.key(), strict=True))
        row |= {"stage": config.stage, **spent(place, config)}
        if evaluated(config):
            stored = place.stage / "evaluation.json"
            if not stored.exists():
                storage.write_json(stored, measure(config, checkpoint(place.stage), loaded))
            row |= storage.read_json(stored, "the study")
        rows.append(row)
    return rows


def spent(place, config):
    """What a run has spent up to and with a stage, and the stage's own reward, from metrics.jsonl."""
    lines = [line for line in metrics.read(place.metrics) if line["stage"] <= config.stage]
    own = next(line for line in lines if line["stage"] == config.stage and line["step"] == "select")
    return {
        "queries": own["reward/queries"],
        "unet_evals": sum(line.get("perf/unet_evals", 0) for line in lines),
        "seconds": round(sum(line["time_s"] for line in lines), 1),
        "reward_samples": own["reward/mean"],
        "oracle_samples": own["oracle/alignment"],
    }


def start_worker():
    """A worker's output is its runs' log files; it ends with the process that started it, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    processes.follow_parent()


def main(out, kind, cells=(), seeds=(), changes=()):
    """Run the matrix, one warm process a core, and write the report after every run that ends.

    Runs of which out/results.csv has the last stage are done. cells, seeds, changes: see matrix.
    """
    import torch

    runs, began = matrix(kind, cells, seeds, changes), time.perf_counter()
    if unknown := set(cells) - {":".join(run[:2]) for run in runs}:
        known = " ".join(dict.fromkeys(":".join(run[:2]) for run in matrix(kind)))
        raise UserError(f"--rows {' '.join(sorted(unknown))}: must be of {known}")
    if kind == "search" and seeds:
        raise UserError("--seeds: the search has its own; without --search the rows take others")
    config = configure(runs[0], out, kind)
    base = out / "base.json"
    lock.hold(out)
    if not base.exists():
        print("evaluating the base model ...", flush=True)
        storage.write_json(base, measure(config, None, models.Models(config)))
    rows = report.read(out / "results.csv")
    stages = collections.Counter((r["algorithm"], r["method"], r["settings"], r["seed"]) for r in rows)
    runs = [job for job in runs if stages[job.key()] < configure(job, out, kind).schedule.stage_count]
    if rows:
        report.write(out, rows, storage.read_json(base, "the study"))
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # of the workers, which start after this
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    futures, failed = {pool.submit(run, job, out, kind): job for job in runs}, []
    try:
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            job = futures[future]
            said = f"{number}/{len(runs)} {' '.join(map(str, job.key()))}: "
            try:
                rows += future.result()
                last, minutes = rows[-1], (time.perf_counter() - began) / 60
                figures = f"oracle {last['oracle_train']:.3f} train, {last['oracle_test']:.3f} held-out"
                print(f"{said}{figures}; {minutes:.1f} min", flush=True)
            except UserError as error:  # a run that diverged is a result too; the others go on
                failed.append(f"{' '.join(map(str, job.key()))}: {error}")
                print(f"{said}failed: {error}", flush=True)
            if rows:
                report.write(out, rows, storage.read_json(base, "the study"), failed)
        pool.shutdown()  # left to the interpreter's end it sometimes says that its pipe is gone
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed; the report has the others, and names these")
    print((out / "table.md").read_text(encoding="utf-8"))
