"""The benchmarks of designs.py: tasks × arms × paired seeds, evaluated after every 240 reward queries.

`python -m b2diffurl.study.benchmark [--design NAME] [--search] [--out DIR] [--tasks NAME ...] [--arms NAME ...]
[--seeds N ...] [--lists NAME]` writes results.csv (a row per run and stage), table.md, curves.png and ratios.png into
DIR/results or, with --search, DIR/search; one process a core (see runs.worker_count); the same command goes on where it
was stopped. --search tries the settings of the design's grid on prompts and seeds of its own, and draws nothing.
--lists takes the prompts of prompts/shapes_NAME_{train,test}.json for all tasks, and writes into DIR/results_NAME.
"""

import argparse
import functools
import itertools
import pathlib
import re
import sys
import time
import typing

from ..average import evaluated
from ..errors import UserError
from ..models import Models
from ..plan import queries
from ..run import lock, storage
from ..run.command import parse
from ..run.folder import Run
from ..stages.loop import run_stage
from . import benchmark_report, results
from .benchmark_measures import FIGURES, measure, spent
from .designs import DESIGNS
from .runs import each

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
    search: bool = False  # on the search's prompts

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


def search_jobs(tasks, grid, seeds):
    """The Jobs of the search: every setting of a grid, {arm: [settings]}, all of a seed before the next one."""
    return [
        Job(task, arm, seed, tuple(own.items()), search=True)
        for seed, task, arm in itertools.product(seeds, tasks, grid)
        for own in grid[arm]
    ]


def configure(job, out, design):
    """A run's checked configuration. UserError where one of its settings is refused."""
    task = design.tasks[job.task]
    lists = task.search if job.search else task.lists
    settings = {
        "exp_name": re.sub(r"[^\w.-]+", "_", job.name()), "save_path": str(out / "runs"), "seed": job.seed,
        "reward.name": task.reward, "prompts.train": f"prompts/shapes_{lists}_train.json",
        "prompts.test": f"prompts/shapes_{lists}_test.json", "evaluate.images_per_prompt": task.images,
        "keep.images": 1, "keep.trajectories": 1, "keep.optimiser": 2, **design.shared, **design.arms[job.arm],
        **dict(job.settings),
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    config = parse(["benchmark", "--config", f"config/stage_process.py:{design.preset}", *flags])[0]
    config.schedule.stage_count = design.less.get(job.arm, design.budget) // queries(config)
    return config


def on_lists(design, lists):
    """The design with other prompts for all of its tasks."""
    return design._replace(tasks={name: task._replace(lists=lists) for name, task in design.tasks.items()})


def unsearched(design, arms):
    """Those of the arms that the search is to give a learning rate, and that have none yet."""
    return [arm for arm in arms if arm in design.grid and "train.learning_rate" not in design.shared | design.arms[arm]]


def run(job, out, design):
    """One run, or what is left of it -> its rows of results.csv, one per stage."""
    config = configure(job, out, design)
    stages, rows, loaded, passed = config.schedule.stage_count, [], Models(config), 0
    for config.stage in range(stages):
        place = Run(config)
        if not (place.stage / "checkpoints").is_dir():
            run_stage(config, loaded=loaded)
        row = {**job.key(), "stage": config.stage, **spent(place, config)}
        before, passed = passed, row["queries"] // design.every
        if passed > before or config.stage == stages - 1:
            stored = place.stage / "evaluation.json"
            if not stored.exists():
                storage.write_json(
                    stored, measure(config, evaluated(config, place.checkpoint), loaded, design.tasks[job.task].success)
                )
            row |= storage.read_json(stored, "the benchmark")
        rows.append(row)
    return rows


def main(out, jobs, design):
    """Run what results.csv in the folder `out` lacks of the jobs; the report is written after every run that ends.

    UserError where another process works in `out`, and at the end where runs failed; these have a row, and are not run
    again.
    """
    began, path = time.perf_counter(), out / "results.csv"
    lock.hold(out)
    rows, failed = stored(path), []
    done = {tuple(row[name] for name in KEYS) for row in rows}
    left = [job for job in jobs if tuple(job.key().values()) not in done]
    base = base_figures(out, jobs, design)
    for number, (job, found) in enumerate(each(left, functools.partial(run, out=out, design=design)), 1):
        if isinstance(found, UserError):
            failed.append(f"{job.name()}: {found}")
            found, said = [failure(job, found, base[job.task], design)], f"failed: {found}"
        else:
            said = f"{found[-1]['success_train']:.3f} train, {found[-1]['success_test']:.3f} held-out"
        rows += found
        results.write(path, sorted(rows, key=lambda r: tuple(r[n] for n in (*KEYS, "stage"))), COLUMNS)
        benchmark_report.write(out, stored(path), base, design)
        print(f"{number}/{len(left)} {job.name()}: {said}; {(time.perf_counter() - began) / 60:.1f} min", flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(left)} runs failed: {'; '.join(failed)}")
    benchmark_report.write(out, stored(path), base, design)
    print((out / "table.md").read_text(encoding="utf-8"))


def stored(path):
    """The rows of a results.csv, rounded as they are there."""
    return [{"settings": "", **row} for row in results.read(path, TEXTS, COUNTS)]


def failure(job, error, base, design):
    """The row of a run that stopped with an error: the base model's figures at its end, at no compute."""
    spent = {
        **dict.fromkeys(COUNTS[1:], 0),
        "queries": design.less.get(job.arm, design.budget),
        "approx_kl": 0.0,
        "seconds": 0.0,
    }
    return {**job.key(), **spent, **base, "failed": str(error)}


def base_figures(out, jobs, design):
    """{task: what measure finds for the base model} of the jobs' tasks, from base.json, where it is completed."""
    path = out / "base.json"
    known = storage.read_json(path, "the benchmark") if path.exists() else {}
    for job in {job.task: job for job in jobs if job.task not in known}.values():
        config = configure(job, out, design)
        known[job.task] = measure(config, None, Models(config), design.tasks[job.task].success)
        storage.write_json(path, known)
    return known


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.study.benchmark", description="See docs/benchmark.")
    parser.add_argument(
        "--design",
        default="sparse",
        choices=DESIGNS,
        help="of designs.py: docs/benchmark, docs/benchmark/flow, docs/d-fusion",
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results and the runs; the design's own")
    parser.add_argument("--search", action="store_true", help="every setting of the grid, on other prompts and seeds")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--lists", help="prompts/shapes_NAME_{train,test}.json for all tasks; into --out/results_NAME")
    given = parser.parse_args()
    if given.lists and (given.search or not given.out):
        parser.error("--lists: with an --out of your own, and without --search, which has its own")
    chosen = on_lists(DESIGNS[given.design], given.lists) if given.lists else DESIGNS[given.design]
    known = {"tasks": chosen.tasks, "arms": chosen.grid if given.search else chosen.arms}
    for name, own in known.items():
        if unknown := {*(getattr(given, name) or ())} - own.keys():
            parser.error(f"--{name}: no {', '.join(sorted(unknown))} in {', '.join(own)}")
    tasks, arms = ([*dict.fromkeys(getattr(given, name) or own)] for name, own in known.items())
    kind = f"results_{given.lists}" if given.lists else "results"
    seeds = [*dict.fromkeys(given.seeds or ())]
    jobs = benchmark_jobs(tasks, arms, seeds or chosen.seeds)
    if not given.search and (left := unsearched(chosen, arms)):
        parser.error(f"{', '.join(left)}: no learning rate in designs.py yet; --search tries some")
    if given.search:
        tasks = [task for task in tasks if chosen.tasks[task].search]
        grid = {arm: chosen.grid[arm] for arm in arms}
        kind, jobs = "search", search_jobs(tasks, grid, seeds or chosen.search_seeds)
    try:
        folder = (given.out or pathlib.Path(chosen.folder)) / kind
        folder.mkdir(parents=True, exist_ok=True)
        main(folder, jobs, chosen)
    except UserError as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
