"""The benchmark's table.md, curves.png and ratios.png from its rows."""

import itertools
import os

import numpy as np

from ..seeds import holm, interval, lower_bound, p_value, stratified
from . import benchmark_ratios
from .paths import area, diversity_gap, path_of, spent_to, until

MARKS = (0.8, 0.9)  # of held-out success
AXES = {"queries": "reward queries", "forwards": "forward passes (training one transition is 3)"}


def write(out, rows, base, design):
    """Write them into the folder `out`, of a search the table alone.

    rows: dicts of benchmark.COLUMNS; base: {task: figures of the base model}.
    """
    (out / "table.md").write_text(text(rows, base, design), encoding="utf-8")
    shown = [row for row in rows if "failed" not in row and not row["settings"]]  # the table has the others too
    if whole := runs_of(shown):
        colours = benchmark_ratios.colours(design.arms, whole)
        draw(out / "curves.png", whole, base, colours)
        benchmark_ratios.draw(out / "ratios.png", whole, base, design.reference, colours)


def text(rows, base, design):
    """What table.md says."""
    runs = runs_of(rows)
    parts = table(runs, base), searched(runs, base), middles(runs, base), primary(runs, base, design)
    parts += differences(runs, base, design), pooled(runs, base, design)
    return "\n\n".join("\n".join(lines) for lines in (*parts, failures(rows)) if lines) + "\n"


def failures(rows):
    """Markdown lines: the runs that stopped with an error, which count with the base model's figures."""
    named = ("task", "arm", "settings", "seed", "failed")
    return [f"Failed: {' '.join(str(row[name]) for name in named)}" for row in rows if "failed" in row]


def runs_of(rows):
    """{(task, arm, settings): {seed: the run's rows, by stage}}, in alphabetical order."""
    runs = {}
    for row in sorted(rows, key=lambda r: [r[name] for name in ("task", "arm", "settings", "seed", "stage")]):
        runs.setdefault((row["task"], row["arm"], row["settings"]), {}).setdefault(row["seed"], []).append(row)
    return runs


def table(runs, base):
    """Markdown lines: every cell's runs, mean and 95 % interval over seeds by Student's t.

    area: the mean height of the curve from the base model at 0 queries to the run's end. Runs that stopped with an
    error have no part in diversity and passes.
    """
    marks = " | ".join(f"queries to {mark}: median (runs that came there)" for mark in MARKS)
    head = f"| task | arm | settings | seeds | held-out: area | end | {marks} | train: end | diversity | M forwards |"
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    for task, own in base.items():
        held_out, train, diversity = (own[name] for name in ("success_test", "success_train", "diversity_train"))
        lines.append(f"| {task} | base model | | | | {held_out:.3f} | | | {train:.3f} | {diversity:.3f} | |")
    for (task, arm, settings), by_seed in runs.items():
        paths = [path_of(run, base[task]) for run in by_seed.values()]
        ends = [run[-1] for run in by_seed.values()]
        spent = [[spent_to(path, mark) for path in paths] for mark in MARKS]
        cells = [
            task, arm, settings, str(len(ends)), said_of([area(path) for path in paths]),
            said_of([end["success_test"] for end in ends]), *(_median(values) for values in spent),
            said_of([end["success_train"] for end in ends]), _whole(ends, "diversity_train", said_of),
            _whole(ends, "forwards", lambda passes: f"{np.mean(passes) / 1e6:.2f}"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def searched(runs, base):
    """Markdown lines of a search: what the choice goes by, of every arm's settings, means over tasks and seeds.

    areas: the mean of those on train and on held-out prompts.
    """
    lines = ["| searched arm | settings | tasks | runs | areas | held-out: end |", "| --- " * 6 + "|"]
    for arm, settings in dict.fromkeys((arm, settings) for _, arm, settings in runs if settings):
        by_task = {task: [*own.values()] for (task, *cell), own in runs.items() if cell == [arm, settings]}
        areas = [
            np.mean([area(path_of(run, base[task], part=part)) for run in own for part in ("train", "test")])
            for task, own in by_task.items()
        ]
        ends = [np.mean([run[-1]["success_test"] for run in own]) for own in by_task.values()]
        count = sum(map(len, by_task.values()))
        cells = arm, settings, ", ".join(by_task), str(count), f"{np.mean(areas):.3f}", f"{np.mean(ends):.3f}"
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _whole(ends, figure, said):
    values = [end[figure] for end in ends if "failed" not in end]
    return said(values) if values else ""


def middles(runs, base):
    """Markdown lines: the interquartile mean of an arm's runs on all tasks, by a bootstrap within each task.

    Only of arms that have runs of every task, and of the seeds that have them all.
    """
    lines = ["| arm | tasks | runs | held-out: IQM of the area | of the end |", "| --- " * 5 + "|"]
    for arm in dict.fromkeys(arm for _, arm, settings in runs if not settings):  # a search has `searched`
        by_task = {task: runs.get((task, arm, ""), {}) for task in base}
        seeds = sorted(set.intersection(*(set(own) for own in by_task.values())))
        if not seeds:
            continue
        areas = [[area(path_of(own[seed], base[task])) for seed in seeds] for task, own in by_task.items()]
        ends = [[own[seed][-1]["success_test"] for seed in seeds] for own in by_task.values()]
        said = [_between(*stratified(strata)) for strata in (areas, ends)]
        cells = (arm, ", ".join(by_task), str(sum(map(len, ends))), *said)
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _median(values):
    reached = int(np.isfinite(values).sum())
    return f"{np.median(values):.0f} ({reached} of {len(values)})".replace("inf", "-")


def primary(runs, base, design):
    """Markdown lines: the arms of design.primary at their end against the rivals at theirs, means of the tasks by seed.

    Only over the seeds that have all of them. Diversity is compared at equal success (paths.diversity_gap); runs that
    stopped with an error have no part in it, nor in passes.
    """
    head = "| primary | seeds | held-out: end | one-sided bound | equal success: diversity | passes, ratio | holds |"
    lines = [head, "| --- " * 7 + "|"]
    for (arm, confidence), other in itertools.product(design.primary, design.rivals):
        pairs = [(runs.get((task, arm, ""), {}), runs.get((task, other, ""), {})) for task in design.tasks]
        seeds = sorted(set.intersection(*(own.keys() & theirs.keys() for own, theirs in pairs)))
        if len(seeds) < 2:
            continue
        by_seed = [[(own[seed], theirs[seed]) for own, theirs in pairs] for seed in seeds]
        gaps = [np.mean([a[-1]["success_test"] - b[-1]["success_test"] for a, b in of_seed]) for of_seed in by_seed]
        whole = [of_seed for of_seed in by_seed if not any("failed" in run[-1] for both in of_seed for run in both)]
        bound, diversity, ratio, holds = lower_bound(gaps, confidence), "-", "-", False
        if whole:
            gaps_of_diversity = [
                np.mean([diversity_gap(*both, base[task]) for task, both in zip(design.tasks, of_seed, strict=True)])
                for of_seed in whole
            ]
            passes = np.mean([a[-1]["forwards"] / b[-1]["forwards"] for of_seed in whole for a, b in of_seed])
            diversity, ratio = said_of(gaps_of_diversity, "+.3f"), f"{passes:.2f}"
            holds = bound > -design.margin and np.mean(gaps_of_diversity) >= -design.diversity_margin and passes <= 1
        wanted = len(design.seeds)
        verdict = f"not decided: {len(seeds)} of {wanted} seeds" if len(seeds) < wanted else str(bool(holds))
        cells = (
            f"{arm} at its end - {other} at its", str(len(seeds)), said_of(gaps, "+.3f"),
            f"{bound:+.3f} ({100 * confidence:g} %)", diversity, ratio, verdict,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def differences(runs, base, design):
    """Markdown lines: pairs of arms by seed and task, in the area, with Holm's p-values.

    The area is that under the held-out curve as far as both runs went. design.second_look is corrected for itself.
    """
    lines = ["| task | arm | against | seeds | held-out: area | p, by Holm | over |", "| --- " * 7 + "|"]
    for family in (design.comparisons, design.second_look):
        found = []
        for task, (arm, other) in itertools.product(base, family):
            areas = [*_areas(runs, base, task, arm, other).values()]
            if len(areas) > 1:
                found.append((task, arm, other, areas))
        whole = len(family) * len(design.tasks)  # those without runs count as if they had shown nothing
        corrected = holm([p_value(areas) for *_, areas in found] + [1.0] * (whole - len(found)))[: len(found)]
        for (task, arm, other, areas), p in zip(found, corrected, strict=True):
            lines.append(f"| {task} | {arm} | {other} | {len(areas)} | {said_of(areas, '+.3f')} | {p:.2g} | {whole} |")
    return lines if len(lines) > 2 else []


def pooled(runs, base, design):
    """Markdown lines: the same of the mean of the tasks, over the seeds that have all of them, uncorrected."""
    lines = ["| mean of the tasks | against | seeds | held-out: area | p, uncorrected |", "| --- " * 5 + "|"]
    for arm, other in (*design.comparisons, *design.second_look):
        by_task = [_areas(runs, base, task, arm, other) for task in design.tasks]
        seeds = sorted(set.intersection(*map(set, by_task)))
        if len(seeds) > 1:
            means = [np.mean([own[seed] for own in by_task]) for seed in seeds]
            lines.append(f"| {arm} | {other} | {len(seeds)} | {said_of(means, '+.3f')} | {p_value(means):.2g} |")
    return lines if len(lines) > 2 else []


def _areas(runs, base, task, arm, other):
    """{seed: the arm's area minus the other's}, as far as both runs went."""
    own, theirs = runs.get((task, arm, ""), {}), runs.get((task, other, ""), {})
    gaps = {}
    for seed in sorted(own.keys() & theirs.keys()):
        a, b = (path_of(run[seed], base[task]) for run in (own, theirs))
        gaps[seed] = area(until(a, b[0][-1])) - area(until(b, a[0][-1]))
    return gaps


def said_of(values, form=".3f"):
    """Mean and interval over seeds, as text."""
    return _between(*interval(values), form)


def _between(middle, low, high, form=".3f"):
    return f"{middle:{form}}" + ("" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def draw(path, runs, base, colours):
    """Write curves.png: held-out success by queries and by forward passes, a row of panels per task.

    In a task's row are the arms with benchmark_ratios.SEEDS seeds of it or more, with intervals; all, without, where
    there is no such arm in any task.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = {cell: own for cell, own in runs.items() if len(own) >= benchmark_ratios.SEEDS}
    shown = whole or runs
    tasks = list(dict.fromkeys(task for task, _, _ in shown))
    seeds = {arm: sorted({len(own) for (_, of, _), own in shown.items() if of == arm}) for _, arm, _ in shown}
    figure, lines = Figure(figsize=(10, 3.4 * len(tasks) + 0.6), layout="constrained"), {}
    for panels, task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        for panel, across in zip(panels, AXES, strict=True):
            for (_, arm, _), by_seed in [item for item in shown.items() if item[0][0] == task]:
                paths = [path_of(run, base[task], across=across) for run in by_seed.values()]
                shortest = min(len(x) for x, _ in paths)
                x = np.mean([x[:shortest] for x, _ in paths], 0)
                mean, low, high = np.array([interval([y[i] for _, y in paths]) for i in range(shortest)]).T
                (lines[arm],) = panel.plot(x, mean, color=colours[arm], marker=".")
                if whole:
                    panel.fill_between(x[1:], low[1:], high[1:], color=colours[arm], alpha=0.12, linewidth=0)
            panel.set(title=f"{task}: held-out success", ylim=(0, 1))
            panel.set_xlabel(AXES[across])
            panel.locator_params(axis="x", nbins=6)
    named = [f"{arm} ({' to '.join(map(str, dict.fromkeys((seeds[arm][0], seeds[arm][-1]))))} seeds)" for arm in lines]
    figure.legend(lines.values(), named, loc="outside upper center", ncols=4, fontsize="small")
    aside = path.with_name("curves.tmp.png")
    FigureCanvasAgg(figure).print_png(aside)
    os.replace(aside, path)
