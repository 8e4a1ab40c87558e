"""Screening: sixteen settings of `b2_lean`, two levels each, tried all at once.

`python -m b2diffurl.study.screen [--out DIR]` runs what DIR/screen.csv lacks, one process a core, and writes table.md:
on the benchmark's four tasks and the search's prompts, every run with a seed of its own and about half of the settings
changed. In all runs of a task each setting is changed in half of them, and each two meet as often as they miss each
other (a fractional factorial design: Box, Hunter & Hunter, "Statistics for Experimenters", 2nd ed., chapter 6), so
every run speaks of every setting. What two settings do together may hide in the effect of a third one, in every task in
that of another, or is noise.
"""

import argparse
import functools
import pathlib
import random
import sys

import numpy as np

from ..errors import UserError
from ..models import Models
from ..run import lock
from . import results
from .benchmark import Job, configure, run
from .designs import SPARSE
from .runs import each

FACTORS = {  # {name: (settings at level 0, which are b2_lean's, and at level 1)}
    "untrained": ({"schedule.untrained": 10}, {"schedule.untrained": 6}),
    "right": ({"schedule.right": 17}, {"schedule.right": 20}),
    "rate": ({"train.learning_rate": 4e-3}, {"train.learning_rate": 7e-3}),
    "linear": ({"train.lr_schedule": "constant"}, {"train.lr_schedule": "linear"}),
    "kl": ({"train.kl_weight": 0.1}, {"train.kl_weight": 0.02}),
    "history": ({"select.history": 8}, {"select.history": 2}),
    "clip": ({"train.clip_range": 0.2}, {"train.clip_range": 0.5}),
    "beta2": ({"train.adam_beta2": 0.999}, {"train.adam_beta2": 0.95}),
    "rank": ({"train.lora_rank": 4}, {"train.lora_rank": 16}),
    "guidance": ({"sample.guidance_scale": 5.0}, {"sample.guidance_scale": 3.0, "evaluate.guidance_scale": 5.0}),
    "cross": (
        {"train.lora_targets": ()},
        {"train.lora_targets": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")},
    ),
    "branches": ({"sample.branches": 5, "sample.groups": 24}, {"sample.branches": 8, "sample.groups": 15}),
    "trajectories": ({"train.trajectories_per_update": 16}, {"train.trajectories_per_update": 10}),
    "negative": ({"train.negative_weight": 1.0}, {"train.negative_weight": 0.5}),
    "value": (
        {"train.value_baseline": False},
        {"train.value_baseline": True, "train.value_learning_rate": 1e-3, "train.value_epochs": 10},
    ),
    "inverse": ({"train.step_weights": "one"}, {"train.step_weights": "inverse_gain"}),
}
RUNS = 64  # of a task in a whole design, a power of 2
STARTED = 224  # the first of all in random order, what there was time for: halves and pairs are nearly balanced
DESIGN = SPARSE._replace(
    tasks={name: task._replace(search="search") for name, task in SPARSE.tasks.items()},
    every=SPARSE.less["b2_lean"],  # evaluated at its end alone
)
FIGURES = ("success_test", "success_train", "diversity_train")
COLUMNS = ("task", "seed", *FACTORS, "forwards", *FIGURES, "failed")


class Trial(Job):
    """A run of the screening."""

    def name(self):
        """Shorter than by its settings, for which a file name has no room."""
        return f"{self.task} {self.arm} {self.seed}"


def plan():
    """[({factor: 0 or 1}, Trial)] in the order in which they are run.

    A factor's level in a task's run i is the parity of the bits that i has in common with the factor's mask.
    """
    rng, found = random.Random(0), []
    for number, task in enumerate(DESIGN.tasks):
        masks = rng.sample(range(1, RUNS), len(FACTORS))
        for i in range(RUNS):
            levels = {name: (i & mask).bit_count() % 2 for name, mask in zip(FACTORS, masks, strict=True)}
            settings = {}
            for name, level in levels.items():
                settings |= FACTORS[name][level]
            seed = 3000 + 100 * number + i
            found.append((levels, Trial(task, "b2_lean", seed, tuple(settings.items()), search=True)))
    rng.shuffle(found)
    return found[:STARTED]


def effects(rows, figure, by_slope=False):
    """{factor: (effect, standard error)}: a figure at level 1 minus that at level 0, by least squares.

    Every task has a mean of its own; by_slope: and a slope in success on train prompts, which is an outcome too and
    measured with noise. The variance left is taken as that of all tasks. Raises UserError where the rows are too few to
    tell all factors apart.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = [[float(row["task"] == task) for row in rows] for task in tasks]
    if by_slope:
        columns += [[row["success_train"] * (row["task"] == task) for row in rows] for task in tasks]
    matrix = np.array([*columns, *([row[name] for row in rows] for name in FACTORS)], dtype=float).T
    count, unknown = matrix.shape
    if count <= unknown or np.linalg.matrix_rank(matrix) < unknown:
        raise UserError(f"{count} runs are too few to tell {len(FACTORS)} settings apart")
    values = np.array([row[figure] for row in rows])
    found = np.linalg.lstsq(matrix, values, rcond=None)[0]
    left = values - matrix @ found
    errors = np.sqrt(left @ left / (count - unknown) * np.linalg.inv(matrix.T @ matrix).diagonal())
    return dict(zip(FACTORS, zip(found[-len(FACTORS) :], errors[-len(FACTORS) :], strict=True), strict=True))


def text(rows):
    """What table.md says: every factor's effects, ± their standard errors.

    Runs that failed are named and left out: a setting that makes runs fail is not punished for it.
    """
    whole = [row for row in rows if "failed" not in row]
    failed = [f"Failed: {row['task']} {row['seed']} {row['failed']}" for row in rows if "failed" in row]
    try:
        kinds = [effects(whole, figure) for figure in FIGURES[:2]] + [effects(whole, FIGURES[2], by_slope=True)]
    except UserError as error:
        return "\n\n".join((f"{error}.", *failed)) + "\n"
    lines = ["| setting | from | to | held-out: end | train: end | diversity, by slope |", "| --- " * 6 + "|"]
    for name, levels in FACTORS.items():
        told = [", ".join(f"{field} {value}" for field, value in own.items()) for own in levels]
        said = [f"{effect:+.3f} ± {error:.3f}" for effect, error in (kind[name] for kind in kinds[:2])]
        said.append("{:+.4f} ± {:.4f}".format(*kinds[2][name]))
        lines.append(f"| {' | '.join((name, *told, *said))} |")
    return "\n\n".join((f"{len(whole)} runs.", "\n".join(lines), *failed)) + "\n"


def stored(path):
    """The rows of a screen.csv."""
    return results.read(path, ("task", "failed"), ("seed", "forwards", *FACTORS))


def unfinished(rows, path):
    """[(levels, Trial)] of the plan that have no row. UserError for a row that is not the plan's."""
    left = {trial.seed: (levels, trial) for levels, trial in plan()}
    for row in rows:
        levels, trial = left.pop(row.get("seed"), ({}, None))
        if trial is None or {"task": trial.task, **levels} != {name: row.get(name) for name in ("task", *FACTORS)}:
            raise UserError(f"{path}: the row of seed {row.get('seed')} is not this plan's; give another --out")
    return list(left.values())


def main(out):
    """Run what screen.csv in the folder `out` lacks, and write it and table.md.

    UserError where another process works in `out`, and at the end where runs failed: these have a row, and are not run
    again.
    """
    lock.hold(out)
    path, failed = out / "screen.csv", []
    rows = stored(path)
    left = unfinished(rows, path)
    if left:
        Models(configure(left[0][1], out, DESIGN)).family  # noqa: B018 - what no run would find is refused here
    levels = {trial.seed: own for own, trial in left}
    trials = [trial for _, trial in left]
    for number, (trial, found) in enumerate(each(trials, functools.partial(run, out=out, design=DESIGN)), 1):
        row = {"task": trial.task, "seed": trial.seed, **levels[trial.seed]}
        if isinstance(found, UserError):
            failed.append(f"{trial.name()}: {found}")
            row["failed"], said = str(found), f"failed: {found}"
        else:
            row |= {name: found[-1][name] for name in ("forwards", *FIGURES)}
            said = f"{row['success_train']:.3f} train, {row['success_test']:.3f} held-out"
        rows.append(row)
        results.write(path, sorted(rows, key=lambda row: row["seed"]), COLUMNS)
        (out / "table.md").write_text(text(stored(path)), encoding="utf-8")
        print(f"{number}/{len(trials)} {trial.name()}: {said}", flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(trials)} runs failed: {'; '.join(failed)}")
    print(text(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.study.screen", description="See docs/benchmark.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmark/screen"))
    try:
        main(parser.parse_args().out)
    except UserError as error:
        sys.exit(f"screen: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
