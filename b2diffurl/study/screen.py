"""Screening: sixteen settings of `b2_lean`, two levels each, tried all at once.

`python -m b2diffurl.study.screen [--out DIR]` runs what DIR/screen.csv lacks, one process a core, and writes table.md:
on the benchmark's four tasks and the search's prompts, every run with a seed of its own and about half of the settings
changed. In all runs of a task each setting is changed in half of them, and each two meet as often as they miss each
other (a fractional factorial design: Box, Hunter & Hunter, "Statistics for Experimenters", 2nd ed., chapter 6), so
every run speaks of every setting. What two settings do together hides in the effect of a third one, in every task in
that of another.
"""

import argparse
import functools
import pathlib
import random
import sys

import numpy as np

from ..errors import UserError
from ..run import lock
from . import results
from .benchmark import Job, run
from .designs import SPARSE
from .runs import each

FACTORS = {  # {name: (settings of its level 0, of its level 1)}
    "untrained": ({"schedule.untrained": 10}, {"schedule.untrained": 6}),
    "right": ({"schedule.right": 17}, {"schedule.right": 20}),
    "rate": ({"train.learning_rate": 4e-3}, {"train.learning_rate": 7e-3}),
    "linear": ({}, {"train.lr_schedule": "linear"}),
    "kl": ({"train.kl_weight": 0.1}, {"train.kl_weight": 0.02}),
    "history": ({}, {"select.history": 2}),
    "clip": ({}, {"train.clip_range": 0.5}),
    "beta2": ({}, {"train.adam_beta2": 0.95}),
    "rank": ({}, {"train.lora_rank": 16}),
    "guidance": ({}, {"sample.guidance_scale": 3.0, "evaluate.guidance_scale": 5.0}),
    "cross": ({}, {"train.lora_targets": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")}),
    "branches": ({}, {"sample.branches": 8, "sample.groups": 15}),
    "trajectories": ({"train.trajectories_per_update": 16}, {"train.trajectories_per_update": 10}),
    "negative": ({}, {"train.negative_weight": 0.5}),
    "value": ({}, {"train.value_baseline": True, "train.value_learning_rate": 1e-3, "train.value_epochs": 10}),
    "inverse": ({}, {"train.step_weights": "inverse_gain"}),
}
RUNS = 64  # of a task, a power of 2
STARTED = 224  # of all, in random order
DESIGN = SPARSE._replace(
    tasks={name: task._replace(search="search") for name, task in SPARSE.tasks.items()},
    every=SPARSE.less["b2_lean"],  # evaluated at its end alone
)
FIGURES = {"success_test": "held-out: end", "success_train": "train: end", "diversity_train": "diversity"}
COLUMNS = ("task", "seed", *FACTORS, "forwards", *FIGURES, "failed")


class Trial(Job):
    """A run of the screening."""

    def name(self):
        """Shorter than by its settings, which no file name has room for."""
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


def effects(rows, figure, equal_success=False):
    """{factor: (effect, standard error)}: a figure's mean at level 1 minus that at level 0, by least squares.

    Every task has a mean of its own; equal_success: and a slope in success on train prompts.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    known = [[float(row["task"] == task) for task in tasks] for row in rows]
    if equal_success:
        known = [[*own, *(row["success_train"] * one for one in own)] for row, own in zip(rows, known, strict=True)]
    matrix = np.array([[*own, *(row[name] - 0.5 for name in FACTORS)] for row, own in zip(rows, known, strict=True)])
    values = np.array([row[figure] for row in rows])
    found = np.linalg.lstsq(matrix, values, rcond=None)[0]
    left = values - matrix @ found
    variance = left @ left / (len(values) - matrix.shape[1])
    errors = np.sqrt(variance * np.linalg.inv(matrix.T @ matrix).diagonal())
    first = matrix.shape[1] - len(FACTORS)
    return dict(zip(FACTORS, zip(found[first:], errors[first:], strict=True), strict=True))


def text(rows):
    """What table.md says: every factor's effects, ± their standard errors. Runs that failed are named and left out."""
    whole = [row for row in rows if "failed" not in row]
    kinds = [effects(whole, "success_test"), effects(whole, "success_train")]
    kinds.append(effects(whole, "diversity_train", equal_success=True))
    lines = ["| setting | from | to | held-out: end | train: end | at equal success: diversity |", "| --- " * 6 + "|"]
    for name, levels in FACTORS.items():
        told = [", ".join(f"{field} {value}" for field, value in own.items()) for own in levels]
        said = [f"{effect:+.3f} ± {error:.3f}" for effect, error in (kind[name] for kind in kinds[:2])]
        said.append("{:+.4f} ± {:.4f}".format(*kinds[2][name]))
        lines.append(f"| {' | '.join((name, *told, *said))} |")
    lines += [f"\nFailed: {row['task']} {row['seed']} {row['failed']}" for row in rows if "failed" in row]
    return f"{len(whole)} runs.\n\n" + "\n".join(lines) + "\n"


def stored(path):
    """The rows of a screen.csv."""
    return results.read(path, ("task", "failed"), ("seed", "forwards", *FACTORS))


def main(out):
    """Run what screen.csv in the folder `out` lacks, and write it and table.md. UserError where another one does so."""
    lock.hold(out)
    path, todo = out / "screen.csv", {trial.seed: (levels, trial) for levels, trial in plan()}
    rows = stored(path)
    for row in rows:
        del todo[row["seed"]]
    trials = [trial for _, trial in todo.values()]
    for trial, found in each(trials, functools.partial(run, out=out, design=DESIGN)):
        figures = {"failed": str(found)} if isinstance(found, UserError) else found[-1]
        row = {"task": trial.task, "seed": trial.seed, **todo[trial.seed][0], **figures}
        rows.append({name: row[name] for name in COLUMNS if name in row})
        results.write(path, sorted(rows, key=lambda row: row["seed"]), COLUMNS)
        print(f"{trial.name()}: {row.get('failed') or format(row['success_test'], '.3f')}", flush=True)
    (out / "table.md").write_text(text(stored(path)), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.study.screen", description="See docs/benchmark.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmark/screen"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        main(given.out)
    except UserError as error:
        sys.exit(f"screen: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
