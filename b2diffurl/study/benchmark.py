"""The benchmark of docs/benchmark/protocol.md: tasks × arms × paired seeds, evaluated after every 240 reward queries.

`python -m b2diffurl.study.benchmark [--search] [--out DIR] [--tasks NAME ...] [--arms NAME ...] [--seeds N ...]` writes
results.csv (a row per run and stage), table.md and curves.png into DIR/results or, with --search, DIR/search; one
process a core; the same command goes on where it was stopped. --search tries the settings of GRID on prompts and a seed
of its own.
"""

import argparse
import functools
import itertools
import pathlib
import sys
import time
import typing

from ..average import evaluated
from ..errors import UserError
from ..models import Models
from ..run import lock, storage
from ..run.command import parse
from ..run.folder import Run
from ..stages.loop import run_stage
from . import benchmark_report, results
from .benchmark_measures import FIGURES, LADDER, measure, spent
from .runs import each


class Task(typing.NamedTuple):
    """What is to be learnt."""

    reward: str  # config.reward.name
    success: str  # the function of LADDER by which a picture counts as a success
    lists: str  # prompts/shapes_LISTS_{train,test}.json
    search: str  # the same for the search


TASKS = {
    "attribute": Task("clip", "right", "study", "search"),
    "dark": Task(LADDER + "right_dark", "right_dark", "study", "search"),
    "left": Task(LADDER + "right_left", "right_left", "study", "search"),
}
SHARED = {"train.log_prob": "sum", "train.clip_range": 0.2, "train.learning_rate": 8e-3}
LEAN = {"train.step_weights": "inverse_gain", "select.credit": "group", "sample.groups": 24, "train.num_epochs": 1}
ARMS = {  # over the preset `shapes` and SHARED
    "ddpo": {"method": "ddpo"},
    "ddpo_contrast": {"method": "ddpo", "select.credit": "contrast"},
    "ddpo_bpt": {"method": "ddpo_bpt"},
    "ddpo_bs": {"method": "ddpo_bs", "schedule.right": 17},
    "b2": {"method": "b2"},
    "b2_lean": {"method": "b2", **LEAN},
    "ddpo_lean": {"method": "ddpo", **LEAN},
}
BUDGET, EVERY = 2880, 240  # reward queries of a run, and between two evaluations
LESS = dict.fromkeys(("b2_lean", "ddpo_lean"), BUDGET // 2)  # arms that must do with less
SEARCH_BUDGET = BUDGET // 2
SEEDS = range(401, 411)
SEARCH_SEED = 201
GRID = {  # what the search tries: {arm: [settings over it]}
    "b2": [{"train.learning_rate": 4e-3}, {}, {"train.step_weights": "inverse_gain"}],
    "ddpo": [{"train.learning_rate": 4e-3}, {}],
    "b2_lean": [
        {},
        {"train.ema_decay": 0.8},
        {"train.lr_schedule": "linear"},
        {"train.trajectories_per_update": 16},
        {"schedule.untrained": 2},
        {"train.num_epochs": 2},
        {"train.num_epochs": 2, "train.learning_rate": 4e-3},
        {"train.num_epochs": 2, "select.credit": "contrast", "train.trajectories_per_update": 16},
    ],
    "ddpo_lean": [{"train.num_epochs": 2, "train.learning_rate": 4e-3, "select.credit": "all"}],
}
KEYS = ("task", "arm", "settings", "seed")  # of a run
TEXTS = (*KEYS[:3], "by_prompt_train", "by_prompt_test", "failed")
COUNTS = ("seed", "stage", "queries", "updates", "kept", "unet_evals", "forwards")
COLUMNS = (
    *KEYS[:3],
    *COUNTS,
    "approx_kl",
    "seconds",
    *(f"{n}_{part}" for n in FIGURES for part in ("train", "test")),
    "failed",
)


class Job(typing.NamedTuple):
    """A run of the benchmark."""

    task: str
    arm: str
    seed: int
    settings: tuple = ()  # (configuration field, value) over the arm's; of the search

    def key(self):
        """What names the run in results.csv: {column: value}."""
        told = ", ".join(f"{name.split('.')[-1]} {value}" for name, value in self.settings)
        return {"task": self.task, "arm": self.arm, "settings": told, "seed": self.seed}

    def name(self):
        """The run in messages, and its folder."""
        return " ".join(str(value) for value in self.key().values() if value != "")


def benchmark_jobs(tasks, arms, seeds):
    """The Jobs of the benchmark, all tasks and arms of a seed before the next one."""
    return [Job(task, arm, seed) for seed, task, arm in itertools.product(seeds, tasks, arms)]


def search_jobs(tasks, arms):
    """The Jobs of the search: every setting of GRID."""
    return [
        Job(t, arm, SEARCH_SEED, tuple(own.items())) for t, arm in itertools.product(tasks, arms) for own in GRID[arm]
    ]


def configure(job, out):
    """A run's checked configuration. UserError where one of its settings is refused."""
    task = TASKS[job.task]
    lists = task.search if job.seed == SEARCH_SEED else task.lists
    settings = {
        "exp_name": job.name().replace(" ", "_").replace(",", ""), "save_path": str(out / "runs"), "seed": job.seed,
        "reward.name": task.reward, "prompts.train": f"prompts/shapes_{lists}_train.json",
        "prompts.test": f"prompts/shapes_{lists}_test.json", "evaluate.images_per_prompt": 16,
        "keep.images": 1, "keep.trajectories": 1, "keep.optimiser": 2, **SHARED, **ARMS[job.arm], **dict(job.settings),
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    config = parse(["benchmark", "--config", "config/stage_process.py:shapes", *flags])[0]
    budget = SEARCH_BUDGET if job.seed == SEARCH_SEED else LESS.get(job.arm, BUDGET)
    config.schedule.stage_count = budget // (config.sample.groups * config.sample.branches)
    return config


def run(job, out):
    """One run, or what is left of it -> its rows of results.csv, one per stage."""
    config = configure(job, out)
    stages, rows, loaded = config.schedule.stage_count, [], Models(config)
    for config.stage in range(stages):
        place = Run(config)
        if not (place.stage / "checkpoints").is_dir():
            run_stage(config, loaded=loaded)
        row = {**job.key(), "stage": config.stage, **spent(place, config)}
        if row["queries"] % EVERY == 0 or config.stage == stages - 1:
            stored = place.stage / "evaluation.json"
            if not stored.exists():
                storage.write_json(
                    stored, measure(config, evaluated(config, place.checkpoint), loaded, TASKS[job.task].success)
                )
            row |= storage.read_json(stored, "the benchmark")
        rows.append(row)
    return rows


def main(out, jobs):
    """Run what results.csv in the folder `out` lacks of the jobs; the report is written after every run that ends.

    UserError where another process works in `out`, and at the end where runs failed; these have a row, and are not run
    again.
    """
    began, path = time.perf_counter(), out / "results.csv"
    lock.hold(out)
    rows, failed = [{"settings": "", **row} for row in results.read(path, TEXTS, COUNTS)], []
    done = {tuple(row[name] for name in KEYS) for row in rows}
    left = [job for job in jobs if tuple(job.key().values()) not in done]
    base = base_figures(out, jobs)
    for number, (job, found) in enumerate(each(left, functools.partial(run, out=out)), 1):
        if isinstance(found, UserError):
            failed.append(f"{job.name()}: {found}")
            found, said = [failure(job, found, base[job.task])], f"failed: {found}"
        else:
            said = f"{found[-1]['success_train']:.3f} train, {found[-1]['success_test']:.3f} held-out"
        rows += found
        results.write(path, sorted(rows, key=lambda r: tuple(r[n] for n in (*KEYS, "stage"))), COLUMNS)
        benchmark_report.write(out, rows, base, TASKS)
        print(f"{number}/{len(left)} {job.name()}: {said}; {(time.perf_counter() - began) / 60:.1f} min", flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(left)} runs failed: {'; '.join(failed)}")
    benchmark_report.write(out, rows, base, TASKS)
    print((out / "table.md").read_text(encoding="utf-8"))


def failure(job, error, base):
    """The row of a run that stopped with an error: the base model's figures at its end, at no compute."""
    spent = {**dict.fromkeys(COUNTS[1:], 0), "queries": LESS.get(job.arm, BUDGET), "approx_kl": 0.0, "seconds": 0.0}
    return {**job.key(), **spent, **base, "failed": str(error)}


def base_figures(out, jobs):
    """{task: what measure finds for the base model} of the jobs' tasks, from base.json, where it is completed."""
    path = out / "base.json"
    known = storage.read_json(path, "the benchmark") if path.exists() else {}
    for job in {job.task: job for job in jobs if job.task not in known}.values():
        config = configure(job, out)
        known[job.task] = measure(config, None, Models(config), TASKS[job.task].success)
        storage.write_json(path, known)
    return known


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.study.benchmark", description="See docs/benchmark.")
    parser.add_argument("--out", default="docs/benchmark", type=pathlib.Path, help="folder of the results and the runs")
    parser.add_argument("--search", action="store_true", help="every setting of the grid, on other prompts and a seed")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS)
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    given = parser.parse_args()
    kind, jobs = "results", benchmark_jobs(given.tasks, given.arms or ARMS, given.seeds)
    if given.search:
        if unknown := {*(given.arms or ())} - GRID.keys():
            parser.error(f"--search has no settings for {', '.join(sorted(unknown))}: see GRID")
        kind, jobs = "search", search_jobs(given.tasks, given.arms or GRID)
    try:
        (given.out / kind).mkdir(parents=True, exist_ok=True)
        main(given.out / kind, jobs)
    except UserError as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
