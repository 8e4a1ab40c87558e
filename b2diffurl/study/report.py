"""A study's report from its rows: results.csv, table.md and curves.png."""

import itertools

import numpy as np

from ..seeds import further, holm, interval, p_value
from . import curves, results
from .results import FIGURES, NAMES, ORDER, cell_of, evaluated_rows, final_rows

BASELINE = "ddpo"  # the method that the others are set against


def write(out, rows, base, failed=()):
    """Write the three files into the folder `out`.

    rows: dicts of results.COLUMNS, at least one; base: {figure: value} of the base model; failed: a text for each run
    that failed.
    """
    rows = sorted(rows, key=lambda r: (*cell_of(r), r["seed"], r["stage"]))
    results.write(out / "results.csv", rows)
    said = "".join(f"\nFailed, and in no mean above: {run}\n" for run in failed)
    (out / "table.md").write_text(table(rows, base) + said, encoding="utf-8")
    curves.draw(out / "curves.png", rows, base)


def table(rows, base):
    """Markdown: the end of every cell's runs, mean and interval over seeds, and each method minus DDPO by seed."""
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
    found = [one for own in dict.fromkeys(cell[0] for cell in cells) for one in comparisons(rows, cells, base, own)]
    lines += [_difference(*one) for one in found]
    note = (
        "Mean over seeds and, in brackets, its 95 % interval by Student's t (seeds taken as normal, so it can pass 1). "
        "Differences are by seed: of both after the same number of queries; then where both had spent as many UNet "
        "evaluations, or had first come as far in alignment, as the one that ended with less (on straight lines "
        "between the evaluated stages; without the seeds at which one ended below the base model)."
    )
    return "\n".join([*lines, "", note, *corrected(found), *further_table(cells)]) + "\n"


def corrected(found):
    """Lines of Markdown: which differences in the oracle's figures survive Holm's correction for their number.

    found: as from comparisons.
    """
    named = [
        (f"{algorithm}, {method} - {BASELINE} {what}, {FIGURES[key]}", [own[key] - other[key] for own, other in pairs])
        for algorithm, method, what, pairs in found
        for key in ("oracle_train", "oracle_test")
        if len(pairs) > 1 and what != f"at equal {FIGURES['oracle_train']}"
    ]
    if not named:
        return []
    p_values = holm([p_value(differences) for _, differences in named])
    kept = [f"{name} (p = {p:.2g})" for (name, _), p in zip(named, p_values, strict=True) if p < 0.05]
    return [
        "",
        f"Of these {len(named)} differences in the oracle's figures, those at equal alignment left out, by paired "
        f"t-tests with Holm's correction for their number, {len(kept)} are from zero at 5 %: "
        f"{'; '.join(kept) or 'none'}.",
    ]


def further_table(cells):
    """Lines of Markdown: for each cell of 3 to 10 seeds, where one further seed's run should end; none without such.

    cells: what final_rows gives.
    """
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
    """An algorithm's methods against ddpo, over the seeds that both have: [(algorithm, method, what is equal, pairs)].

    pairs: (the method's figures, ddpo's), one per seed. None for a method that was run with several settings, or where
    ddpo was. cells: what final_rows gives.
    """
    of = {m: [runs for cell, runs in cells.items() if cell[:2] == (algorithm, m)] for m in ORDER}
    if len(of[BASELINE]) != 1:
        return []
    (plain,), compared = of[BASELINE], []
    for method, found in of.items():
        if method == BASELINE or len(found) != 1 or not (shared := sorted(set(found[0]) & set(plain))):
            continue
        ends = [(found[0][seed], plain[seed]) for seed in shared]
        for what, pairs in _aligned(rows, base, ends):
            compared.append((algorithm, method, what, pairs))
    return compared


def _aligned(rows, base, ends):
    """(what is equal, pairs of figures there) of the pairs of runs that ended in the pairs of rows `ends`."""
    paths = [[evaluated_rows(rows, end) for end in pair] for pair in ends]
    shared = set.intersection(*(set(path) for pair in paths for path in pair))
    for queries in sorted(shared - {theirs["queries"] for _, theirs in ends}):
        yield f"after {queries} queries", [[path[queries] for path in pair] for pair in paths]
    yield "at equal queries", ends
    for axis in ("unet_evals", "oracle_train"):
        both = [[figures_at(rows, base, end, axis, min(e[axis] for e in pair)) for end in pair] for pair in ends]
        if both := [pair for pair in both if all(pair)]:
            yield f"at equal {NAMES[axis]}", both


def _difference(algorithm, method, what, pairs):
    """A line of the table for one of comparisons."""
    gaps = " | ".join(_figure([ours[key] - theirs[key] for ours, theirs in pairs], "+.3f") for key in FIGURES)
    return f"| {algorithm} | {method} - ddpo | {what} | {len(pairs)} | | | {gaps} |"


def figures_at(rows, base, last, axis, where):
    """{figure: value} of a run where its column `axis` first came from the base model's value to `where`.

    last: the row in which the run ended. On straight lines between its evaluated stages; None where it never came
    there, or began beyond.
    """
    path = [{**base, "queries": 0, "unet_evals": 0}, *evaluated_rows(rows, last).values()]
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
