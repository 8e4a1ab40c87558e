"""A study's curves.png: the figures over training by method, or at the end of the runs by settings."""

import os
import re

import numpy as np

from ..seeds import interval
from .results import NAMES, cell_of, final_rows, over_lists

PANELS = (  # across, up: at an equal budget of queries or of compute, and what it costs
    ("queries", "oracle_train"), ("queries", "oracle_test"), ("unet_evals", "oracle_train"),
    ("oracle_train", "diversity_train"), ("reward_train", "oracle_train"),
)  # fmt: skip
WIDTH, HEIGHT = 4.2, 3.6  # inches per panel


def draw(path, rows, base):
    """Write curves.png: draw_methods, or draw_settings where a method of an algorithm was run with several settings.

    rows: dicts of results.COLUMNS, at least one; base: {figure: value} of the base model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    cells = final_rows(rows)
    several = len(cells) > len({cell[:2] for cell in cells})
    figure = (draw_settings if several else draw_methods)(rows, base)
    aside = path.with_name(f"{path.stem}.tmp{path.suffix}")
    FigureCanvasAgg(figure).print_png(aside)
    os.replace(aside, path)


def draw_methods(rows, base):
    """Figure: PANELS over training, mean and 95 % interval over seeds, a row of panels per algorithm."""
    cells = final_rows(rows)
    figure, panels = _panels(cells, len(PANELS))
    for algorithm, own in panels.items():
        for cell in [cell for cell in cells if cell[0] == algorithm]:
            stages = {0: [{**base, "queries": 0, "unet_evals": 0}]}  # the base model, before the first stage
            for row in rows:
                if cell_of(row) == cell and "oracle_train" in row:
                    stages.setdefault(row["stage"] + 1, []).append(row)
            for panel, axes in zip(own, PANELS, strict=True):
                _draw_path(panel, [stages[stage] for stage in sorted(stages)], axes, " ".join(cell[1:]))
        for panel, (across, up) in zip(own, PANELS, strict=True):
            panel.set(title=f"{algorithm}: {NAMES[up]}", xlabel=NAMES[across])
            panel.locator_params(axis="x", nbins=5)
        own[0].legend(fontsize="x-small")
    return figure


def _draw_path(panel, stages, axes, label):
    """A method's line with its band; stages: the rows of all seeds by stage, axes: the columns (across, up)."""
    across, up = axes
    x = [np.mean([row[across] for row in rows]) for rows in stages]
    mean, low, high = np.array([interval([row[up] for row in rows]) for rows in stages]).T
    low[0], high[0] = mean[0], mean[0]
    panel.plot(x, mean, marker=".", label=label)
    panel.fill_between(x, low, high, alpha=0.2)  # nothing where a single seed has no interval


def draw_settings(rows, base):
    """Figure: reward and oracle at the end of the runs by settings, and the one against the other.

    A row of panels per algorithm; the last one has every evaluation of every run: off the line, the reward is gamed.
    """
    cells = final_rows(rows)
    figure, panels = _panels(cells, 3)
    for algorithm, (*ends, every) in panels.items():
        own = {cell: runs for cell, runs in cells.items() if cell[0] == algorithm}
        settings = sorted(dict.fromkeys(cell[2] for cell in own), key=numbers)
        for panel, key in zip(ends, ("reward", "oracle"), strict=True):
            _draw_ends(panel, own, settings, key)
            panel.axhline(over_lists(base, key), color="grey", linewidth=0.8)
            panel.set(title=f"{algorithm}: {key} at the end", ylabel="mean of train and held-out")
        _draw_every(every, [row for row in rows if row["algorithm"] == algorithm], settings)
        every.set(title=f"{algorithm}: every evaluation", xlabel="reward", ylabel="oracle")
        ends[0].legend(fontsize="x-small")
        every.legend(fontsize="xx-small")
    return figure


def _draw_ends(panel, cells, settings, key):
    """A figure at the end of an algorithm's runs, by settings: a line of means per method, a dot per run."""
    for method in dict.fromkeys(cell[1] for cell in cells):
        runs = {cell[2]: own.values() for cell, own in cells.items() if cell[1] == method}
        ends = {i: [over_lists(row, key) for row in runs[s]] for i, s in enumerate(settings) if s in runs}
        (line,) = panel.plot(ends.keys(), [np.mean(values) for values in ends.values()], label=method)
        dots = [(i, value) for i, values in ends.items() for value in values]
        panel.scatter(*zip(*dots, strict=True), s=8, color=line.get_color())
    labels, fields = axis_labels(settings)
    panel.set_xticks(range(len(settings)), labels, rotation=30, ha="right", fontsize="x-small")
    panel.set_xlabel(fields)


def _draw_every(panel, rows, settings):
    """The oracle against the reward at every evaluation, a colour per settings."""
    for number, chosen in enumerate(settings):
        seen = [row for row in rows if row["settings"] == chosen and "oracle_train" in row]
        reward, oracle = ([over_lists(row, key) for row in seen] for key in ("reward", "oracle"))
        panel.scatter(reward, oracle, s=8, color=f"C{number}", label=chosen)


def _panels(cells, columns):
    """(Figure, {algorithm: array (columns,) of its panels}) for cells of final_rows."""
    from matplotlib.figure import Figure

    algorithms = list(dict.fromkeys(algorithm for algorithm, _, _ in cells))
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * len(algorithms)), layout="constrained")
    axes = figure.subplots(len(algorithms), columns, squeeze=False)
    return figure, dict(zip(algorithms, axes, strict=True))


def axis_labels(settings):
    """What tells runs apart on an axis, by their settings as text -> (labels, the axis's name).

    The name is the fields that all settings share, whose values are the labels; "" where the fields differ.
    """
    parts = [text.split(", ") for text in settings]
    fields = {", ".join(part.split()[0] for part in own) for own in parts}
    if len(fields) == 1:
        return [", ".join(part.partition(" ")[2] for part in own) for own in parts], fields.pop()
    common = set.intersection(*map(set, parts))
    return [", ".join(part for part in own if part not in common) or ", ".join(own) for own in parts], ""


def numbers(settings):
    """The numbers in a run's settings as text, in their order."""
    return [float(number) for number in re.findall(r"(?<= )\d+\.?\d*(?:e-?\d+)?", settings)]
