"""ratios.png of the benchmark: what an arm spends to a mark against another one, by how sparse the task's reward is."""

import os

import numpy as np

from ..seeds import interval
from .paths import path_of, spent_to

AXES = {"queries": "reward queries", "forwards": "forward passes"}
SHARE = 0.5  # the mark: so much of what the base model lacks to success on every held-out prompt


def ratios(runs, base, reference, across):
    """{arm: [(base success, ratio, low, high) by task]}: geometric means over paired seeds, 95 % by Student's t.

    runs: as benchmark_report.runs_of has them; across: one of AXES. Both runs of a pair are looked at as far as the
    one with fewer queries went; one that does not have the mark there counts with all that it spent so far.
    """
    found = {}
    for (task, arm, settings), by_seed in runs.items():
        others = runs.get((task, reference, ""), {})
        seeds = sorted(by_seed.keys() & others.keys())
        if settings or arm == reference or len(seeds) < 2:
            continue
        start = base[task]["success_test"]
        mark = start + SHARE * (1 - start)
        logs = []
        for pair in [(by_seed[seed], others[seed]) for seed in seeds]:
            last = min(run[-1]["queries"] for run in pair)
            own, theirs = (_spent([r for r in run if r["queries"] <= last], base[task], mark, across) for run in pair)
            logs.append(np.log(own / theirs))
        found.setdefault(arm, []).append((start, *np.exp(interval(logs))))
    return {arm: sorted(points) for arm, points in found.items()}


def _spent(run, base, mark, across):
    path = path_of(run, base, across=across)
    return min(spent_to(path, mark), float(path[0][-1]))


def draw(path, runs, base, reference):
    """Write the figure: a panel for each of AXES, a line for each arm; nothing where no arm has two paired seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {across: ratios(runs, base, reference, across) for across in AXES}
    if not any(found.values()):
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, (across, name) in zip(figure.subplots(1, 2), AXES.items(), strict=True):
        for arm, points in found[across].items():
            x, ratio, low, high = np.array(points).T
            panel.errorbar(x, ratio, (ratio - low, high - ratio), marker=".", capsize=3, label=arm)
        panel.axhline(1, color="0.6", linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel="the base model's success", title=f"{name} / those of {reference}")
        panel.legend(fontsize="x-small")
    aside = path.with_name("ratios.tmp.png")
    FigureCanvasAgg(figure).print_png(aside)
    os.replace(aside, path)
