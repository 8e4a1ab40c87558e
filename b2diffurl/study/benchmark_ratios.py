"""ratios.png of the benchmark: what an arm spends to a mark against another one, by how sparse the task's reward is."""

import os

import numpy as np

from ..seeds import interval
from .paths import path_of, spent_to

AXES = {"queries": "reward queries", "forwards": "forward passes"}
SHARE = 0.5  # the mark: so much of what the base model lacks to success on every held-out prompt
SEEDS = 5  # the fewest pairs of which an interval is drawn
COLOURS = (*(f"C{number}" for number in range(10)), "black", "gold", "lightgreen")


def ratios(runs, base, reference, across):
    """{arm: {task: (ratio, low, high)}}: geometric means over paired seeds, 95 % by Student's t.

    runs: as benchmark_report.runs_of has them; across: one of AXES. Both runs of a pair are looked at as far as the
    one with fewer queries went; one that does not have the mark there counts with all that it spent so far, which draws
    ratios towards that of what both spent, and makes intervals narrower. A task on which most pairs have no run that
    has it says nothing and is left out.
    """
    found = {}
    for (task, arm, settings), by_seed in runs.items():
        others = runs.get((task, reference, ""), {})
        seeds = sorted(by_seed.keys() & others.keys())
        if settings or arm == reference or len(seeds) < 2:
            continue
        start = base[task]["success_test"]
        mark = start + SHARE * (1 - start)
        logs, reached = [], 0
        for pair in [(by_seed[seed], others[seed]) for seed in seeds]:
            last = min(run[-1]["queries"] for run in pair)
            cut = [path_of([r for r in run if r["queries"] <= last], base[task], across=across) for run in pair]
            own, theirs = (min(spent_to(path, mark), float(path[0][-1])) for path in cut)
            reached += any(heights.max() >= mark for _, heights in cut)
            logs.append(np.log(own / theirs))
        if 2 * reached >= len(seeds):
            found.setdefault(arm, {})[task] = tuple(np.exp(interval(logs)))
    return found


def colours(arms, runs):
    """{arm: its colour in all figures}: of a design's arms, in their order, then of others that runs has."""
    names = dict.fromkeys((*arms, *(arm for _, arm, _ in runs)))
    return {arm: COLOURS[number % len(COLOURS)] for number, arm in enumerate(names)}


def draw(path, runs, base, reference, colours):
    """Write the figure: a panel for each of AXES, tasks from the sparsest on, a mark for each arm.

    Of arms with SEEDS paired seeds or more; nothing where there is none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paired = {
        cell: own
        for cell, own in runs.items()
        if len(own.keys() & runs.get((cell[0], reference, ""), {}).keys()) >= SEEDS
    }
    found = {across: ratios(paired, base, reference, across) for across in AXES}
    if not any(found.values()):
        return
    shown = {task for own in found["queries"].values() for task in own}
    tasks = sorted(shown, key=lambda task: (base[task]["success_test"], task))
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for panel, (across, name) in zip(figure.subplots(1, 2), AXES.items(), strict=True):
        for number, (arm, points) in enumerate(found[across].items()):
            ratio, low, high = np.array([*points.values()]).T
            x = [tasks.index(task) + 0.08 * (number - (len(found[across]) - 1) / 2) for task in points]
            panel.errorbar(x, ratio, (ratio - low, high - ratio), fmt=".", color=colours[arm], capsize=3, label=arm)
        panel.axhline(1, color="0.6", linewidth=0.8)
        panel.set_xticks(range(len(tasks)), [f"{task}\n{base[task]['success_test']:.2f}" for task in tasks])
        panel.set(yscale="log", xlabel="task, and the base model's success", title=f"{name} / those of {reference}")
        ticks = (0.1, 0.2, 0.5, 1, 2)
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_yticks([], minor=True)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=8, fontsize="small")
    aside = path.with_name("ratios.tmp.png")
    FigureCanvasAgg(figure).print_png(aside)
    os.replace(aside, path)
