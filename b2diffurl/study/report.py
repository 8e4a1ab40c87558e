"""A study's results.csv, table.md and curves.png from its rows."""

import csv
import itertools
import os
import re

import numpy as np

FIGURES = {
    "oracle_train": "oracle, train",
    "oracle_test": "oracle, held-out",
    "reward_train": "reward, train",
    "reward_test": "reward, held-out",
    "diversity_train": "CLIP diversity, train",
    "entropy_train": "open entropy (bits), train",
}
PANELS = (  # across, up: at an equal budget of queries or of compute, and what it costs
    ("queries", "oracle_train"), ("queries", "oracle_test"), ("unet_evals", "oracle_train"),
    ("oracle_train", "diversity_train"), ("reward_train", "oracle_train"),
)  # fmt: skip
NAMES = {**FIGURES, "queries": "reward queries", "unet_evals": "UNet evaluations"}
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantile, 1 to 9 degrees
ORDER = ("ddpo_is", "ddpo_is_sum", "ddpo_sf", "dpok", "dpo", "ddpo", "ddpo_bpt", "ddpo_bs", "b2")
COLUMNS = (
    "algorithm", "method", "settings", "seed", "stage", "queries", "unet_evals", "seconds", "reward_samples",
    "oracle_samples", "reward_train", "reward_test", "oracle_train", "oracle_test", "diversity_train",
    "diversity_test", "entropy_train", "entropy_test",
)  # fmt: skip


def write(out, rows, base, failed=()):
    """Write the three files; rows: dicts of COLUMNS, base: the base model's figures, failed: runs without an end.

    results.csv is written whole or not at all, since the study goes on from it.
    """
    rows = sorted(rows, key=lambda r: (*_cell_of(r), r["seed"], r["stage"]))
    aside = out / "results.csv.tmp"
    with aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    os.replace(aside, out / "results.csv")
    said = "".join(f"\nFailed, and in no mean above: {run}\n" for run in failed)
    (out / "table.md").write_text(table(rows, base) + said, encoding="utf-8")
    cells = {_cell_of(row) for row in rows}
    (draw if len(cells) == len({cell[:2] for cell in cells}) else draw_grid)(out, rows, base)


def read(path):
    """The rows of a results.csv as write got them; none where there is no file."""
    if not path.exists():
        return []
    texts, counts = ("algorithm", "method", "settings"), ("seed", "stage", "queries", "unet_evals")
    with path.open(newline="", encoding="utf-8") as stream:
        return [
            {k: v if k in texts else int(v) if k in counts else float(v) for k, v in row.items() if v != ""}
            for row in csv.DictReader(stream)
        ]


def interval(values, resamples=10_000):
    """Mean over seeds and its 95 % bootstrap interval: (mean, low, high); a single seed has no interval (nan)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return values.mean(), np.nan, np.nan
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return values.mean(), *np.quantile(values[draws].mean(1), [0.025, 0.975])


def further(values):
    """Where one further seed's value lands with 95 %, values taken as normal (Student's t): (low, high).

    values: of 2 to 10 seeds.
    """
    values = np.asarray(values, dtype=float)
    half = STUDENT_T[len(values) - 2] * values.std(ddof=1) * np.sqrt(1 + 1 / len(values))
    return values.mean() - half, values.mean() + half


def final_rows(rows):
    """{(algorithm, method, settings): {seed: the row of the run's last stage}} in the order of the table."""
    cells = {}
    for row in sorted(rows, key=lambda r: (ORDER.index(r["algorithm"]), ORDER.index(r["method"]), r["stage"])):
        cells.setdefault(_cell_of(row), {})[row["seed"]] = row
    return cells


def _cell_of(row):
    return row["algorithm"], row["method"], row["settings"]


def table(rows, base):
    """Markdown: the end of every row of the matrix, mean and interval over seeds, and B² minus DDPO by seed."""
    lines = [
        f"| algorithm | method | settings | seeds | queries | UNet evaluations | {' | '.join(FIGURES.values())} |",
        "| --- " * (6 + len(FIGURES)) + "|",
        f"| none | base model | - | - | 0 | 0 | {' | '.join(f'{base[key]:.3f}' for key in FIGURES)} |",
    ]
    cells = final_rows(rows)
    for (algorithm, method, settings), runs in cells.items():
        figures = " | ".join(_figure([row[key] for row in runs.values()]) for key in FIGURES)
        spent = f"{max(row['queries'] for row in runs.values())} | {_millions(runs.values())}"
        lines.append(f"| {algorithm} | {method} | {settings} | {len(runs)} | {spent} | {figures} |")
    for algorithm in dict.fromkeys(algorithm for algorithm, _, _ in cells):
        lines += comparisons(rows, cells, base, algorithm)
    note = (
        "Mean over seeds and, in brackets, its 95 % bootstrap interval, which is too narrow for so few seeds. "
        "Differences are by seed: of both after the same number of queries; then where both had spent as many UNet "
        "evaluations, or had first come as far in alignment, as the one that ended with less (on straight lines "
        "between the evaluated stages; without the seeds at which one ended below the base model)."
    )
    return "\n".join([*lines, "", note, *further_table(cells)]) + "\n"


def further_table(cells):
    """Lines of Markdown: by row of the matrix of 3 to 10 seeds, where one further seed's run should end."""
    keys, lines = ("oracle_train", "oracle_test", "reward_train", "reward_test"), []
    for cell, runs in cells.items():
        if 3 <= len(runs) <= 10:
            spans = [further([row[key] for row in runs.values()]) for key in keys]
            lines.append(f"| {' | '.join([*cell, *(f'[{low:.3f}, {high:.3f}]' for low, high in spans)])} |")
    if lines:
        named = "Where one further seed's run ends with 95 % (Student's t; seeds taken as normal, so it can pass 1):"
        titles = ["algorithm", "method", "settings", *(FIGURES[key] for key in keys)]
        lines = ["", named, "", f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|", *lines]
    return lines


def comparisons(rows, cells, base, algorithm):
    """Lines of the table: each method minus ddpo; none where a method was run with several settings."""
    of = {m: [runs for cell, runs in cells.items() if cell[:2] == (algorithm, m)] for m in ORDER}
    if len(of["ddpo"]) != 1:
        return []
    (plain,), lines = of["ddpo"], []
    for method, found in of.items():
        if method == "ddpo" or len(found) != 1 or not (shared := sorted(set(found[0]) & set(plain))):
            continue
        ours, theirs = ({seed: _evaluated(rows, runs[seed]) for seed in shared} for runs in (found[0], plain))
        marks = set.intersection(*(set(run) for runs in (ours, theirs) for run in runs.values()))
        for queries in sorted(marks - {run["queries"] for run in plain.values()}):
            pairs = [(ours[seed][queries], theirs[seed][queries]) for seed in shared]
            lines.append(_difference(algorithm, method, f"after {queries} queries", pairs))
        pairs = [(found[0][seed], plain[seed]) for seed in shared]
        lines.append(_difference(algorithm, method, "at equal queries", pairs))
        for axis in ("unet_evals", "oracle_train"):
            both = [[_at(rows, base, end, axis, min(e[axis] for e in ends)) for end in ends] for ends in pairs]
            if both := [ends for ends in both if all(ends)]:
                lines.append(_difference(algorithm, method, f"at equal {NAMES[axis]}", both))
    return lines


def _difference(algorithm, method, what, pairs):
    """A line of the table; pairs: (the method's figures, ddpo's), one a seed."""
    gaps = " | ".join(_figure([ours[key] - theirs[key] for ours, theirs in pairs], "+.3f") for key in FIGURES)
    return f"| {algorithm} | {method} - ddpo | {what} | {len(pairs)} | | | {gaps} |"


def _evaluated(rows, last):
    """{queries: row} of the evaluated stages of the run that ended in the row `last`."""
    run = (*_cell_of(last), last["seed"])
    return {r["queries"]: r for r in rows if (*_cell_of(r), r["seed"]) == run and "oracle_train" in r}


def _at(rows, base, last, axis, where):
    """{figure: value} of the run that ended in the row `last`, where it first got from the base model to `where`.

    Between its evaluated stages on a straight line; None where it never got there, or began beyond.
    """
    path = [{**base, "queries": 0, "unet_evals": 0}, *_evaluated(rows, last).values()]
    for before, after in itertools.pairwise(path):
        if path[0][axis] <= where and before[axis] <= where <= after[axis]:
            share = (where - before[axis]) / ((after[axis] - before[axis]) or 1)
            return {key: before[key] + share * (after[key] - before[key]) for key in FIGURES}
    return None


def _millions(runs):
    return f"{np.mean([row['unet_evals'] for row in runs]) / 1e6:.2f} M"


def _figure(values, form=".3f"):
    mean, low, high = interval(values)
    return f"{mean:{form}}" + ("" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def draw(out, rows, base):
    """curves.png: PANELS over training, mean and 95 % interval over seeds; a row of panels an algorithm."""
    from matplotlib.figure import Figure

    cells = final_rows(rows)
    algorithms = list(dict.fromkeys(algorithm for algorithm, _, _ in cells))
    figure = Figure(figsize=(4.2 * len(PANELS), 3.6 * len(algorithms)), layout="constrained")
    axes = figure.subplots(len(algorithms), len(PANELS), squeeze=False)
    for panels, algorithm in zip(axes, algorithms, strict=True):
        for cell in [c for c in cells if c[0] == algorithm]:
            stages = {0: [{**base, "queries": 0, "unet_evals": 0}]}  # the base model, before the first stage
            for row in rows:
                if _cell_of(row) == cell and "oracle_train" in row:
                    stages.setdefault(row["stage"] + 1, []).append(row)
            for panel, (across, up) in zip(panels, PANELS, strict=True):
                x = [np.mean([row[across] for row in stages[stage]]) for stage in sorted(stages)]
                bands = [interval([row[up] for row in stages[stage]]) for stage in sorted(stages)]
                mean, low, high = np.array(bands).T
                low[0], high[0] = mean[0], mean[0]
                panel.plot(x, mean, marker=".", label=" ".join(cell[1:]))
                panel.fill_between(x, low, high, alpha=0.2)  # nothing where a single seed has no interval
                panel.set(title=f"{algorithm}: {NAMES[up]}", xlabel=NAMES[across])
                panel.locator_params(axis="x", nbins=5)
        panels[0].legend(fontsize="x-small")
    _save(figure, out)


def draw_grid(out, rows, base):
    """curves.png where methods were run with several settings: the end of the runs by settings, and the reward's truth.

    A row of panels an algorithm; the last one has every evaluation of every run: off the line, the reward is gamed.
    """
    from matplotlib.figure import Figure

    cells = final_rows(rows)
    algorithms = list(dict.fromkeys(algorithm for algorithm, _, _ in cells))
    figure = Figure(figsize=(4.2 * 3, 3.6 * len(algorithms)), layout="constrained")
    axes = figure.subplots(len(algorithms), 3, squeeze=False)
    for panels, algorithm in zip(axes, algorithms, strict=True):
        settings = sorted({cell[2] for cell in cells if cell[0] == algorithm}, key=_numbers)
        for method in dict.fromkeys(cell[1] for cell in cells if cell[0] == algorithm):
            for panel, key in zip(panels, ("reward", "oracle"), strict=False):
                ends = [
                    (i, row) for i, s in enumerate(settings) for row in cells.get((algorithm, method, s), {}).values()
                ]
                means = {i: np.mean([_both(row, key) for place, row in ends if place == i]) for i, _ in ends}
                (line,) = panel.plot(means.keys(), means.values(), label=method)
                panel.scatter([i for i, _ in ends], [_both(row, key) for _, row in ends], s=8, color=line.get_color())
                panel.axhline(_both(base, key), color="grey", linewidth=0.8)
                panel.set(title=f"{algorithm}: {key} at the end", ylabel="mean of train and held-out")
                labels, fields = axis_labels(settings)
                panel.set_xticks(range(len(settings)), labels, rotation=30, ha="right", fontsize="x-small")
                panel.set_xlabel(fields)
        for place, chosen in enumerate(settings):
            seen = [r for r in rows if (r["algorithm"], r["settings"]) == (algorithm, chosen) and "oracle_train" in r]
            panels[2].scatter(
                [_both(row, "reward") for row in seen], [_both(row, "oracle") for row in seen],
                s=8, color=f"C{place}", label=chosen,
            )  # fmt: skip
        panels[2].set(title=f"{algorithm}: every evaluation", xlabel="reward", ylabel="oracle")
        panels[0].legend(fontsize="x-small")
        panels[2].legend(fontsize="xx-small")
    _save(figure, out)


def _both(row, key):
    """The mean of a figure over train and held-out prompts."""
    return (row[f"{key}_train"] + row[f"{key}_test"]) / 2


def axis_labels(settings):
    """What tells runs apart on an axis, by their settings -> (labels, the axis's name, "" where fields differ)."""
    parts = [text.split(", ") for text in settings]
    fields = {", ".join(part.split()[0] for part in own) for own in parts}
    if len(fields) == 1:
        return [", ".join(part.partition(" ")[2] for part in own) for own in parts], fields.pop()
    common = set.intersection(*map(set, parts))
    return [", ".join(part for part in own if part not in common) or ", ".join(own) for own in parts], ""


def _numbers(settings):
    """The numbers in a run's settings, in their order."""
    return [float(number) for number in re.findall(r"(?<= )\d+\.?\d*(?:e-?\d+)?", settings)]


def _save(figure, out):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    aside = out / "curves.tmp.png"
    FigureCanvasAgg(figure).print_png(aside)
    os.replace(aside, out / "curves.png")
