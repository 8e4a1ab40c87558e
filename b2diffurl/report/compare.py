"""Several runs on one page: `python -m b2diffurl.report RUN RUN ... --out compare.html`."""

import itertools
import os
import pathlib

from ..errors import UserError
from ..run import metrics
from ..run.folder import ADDED
from ..seeds import interval
from .embedded import data_uri
from .page import environment, line_chart, read, status

FIGURES = {"reward/mean": "Reward", "oracle/alignment": "Oracle alignment", "diversity/clip": "Diversity"}
AXES = ("reward queries", "UNet evaluations", "minutes")
ENDS = ("oracle", "reward", "clip", "diversity")  # of the evaluation
OWN = ("seed", "exp_name", "save_path")  # settings in which repetitions of one experiment may differ


def main(folders, out):
    """Write the page. Raises UserError where a folder holds no run."""
    runs = [_run(pathlib.Path(folder)) for folder in folders]
    page = (
        environment()
        .get_template("compare.html.j2")
        .render(
            runs=runs,
            differences=differences([run["settings"] for run in runs]),
            ends=ends(runs),
            charts=charts(runs),
            pictures=[
                (run["name"], data_uri(run["picture"].read_bytes(), "png")) for run in runs if run["picture"].exists()
            ],
        )
    )
    out = pathlib.Path(out)
    aside = out.with_name(out.name + ".tmp")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, out)


def _run(folder):
    records = metrics.read(folder / "metrics.jsonl")
    if not records:
        raise UserError(f"{folder}: no run there (no metrics.jsonl, or an empty one)")
    settings = read(folder / "config.json")
    return {
        "name": folder.name,
        "records": records,
        "settings": ADDED | settings if settings else {},
        "status": status(folder, records),
        "results": (read(folder / "eval.json") or {"results": []})["results"],
        "picture": folder / "before_after.png",
    }


def differences(settings):
    """[(setting, its value in each)] of the settings that are not the same in all, the runs' names left out."""
    names = sorted(set(itertools.chain(*settings)) - {"exp_name", "save_path"})
    values = {name: [own.get(name, "-") for own in settings] for name in names}
    return [(name, own) for name, own in values.items() if any(value != own[0] for value in own)]


def path_of(records, figure):
    """{axis: [(spent until a stage's images were scored, the figure there)]} of a run's metrics."""
    spent, points = dict.fromkeys(AXES, 0), {axis: [] for axis in AXES}
    for record in records:
        spent["UNet evaluations"] += record.get("perf/unet_evals", 0)
        spent["minutes"] += record["time_s"] / 60
        if record["step"] == "select" and figure in record:
            spent["reward queries"] = record["reward/queries"]
            for axis in AXES:
                points[axis].append((spent[axis], record[figure]))
    return points


def charts(runs):
    """[{title, image}]: every figure against every axis, a line a run."""
    drawn = []
    for figure, title in FIGURES.items():
        paths = {f"{i + 1}: {run['name']}": path_of(run["records"], figure) for i, run in enumerate(runs)}
        for axis in AXES:
            if series := {name: own[axis] for name, own in paths.items() if own[axis]}:
                drawn.append({"title": f"{title} by {axis}", "image": line_chart(series, axis)})
    return drawn


def ends(runs):
    """{titles, rows}: the figures after training, by list of prompts; repetitions of one experiment together."""
    found = {}
    for run in runs:
        same = tuple(sorted((name, str(v)) for name, v in run["settings"].items() if name not in OWN))
        found.setdefault(same, []).append(run)
    lists = list(dict.fromkeys(row["prompts"] for run in runs for row in run["results"]))
    columns = [
        (own, figure)
        for own in lists
        for figure in ENDS
        if any(figure in row for run in runs for row in run["results"] if row["prompts"] == own)
    ]
    rows = []
    for same in found.values():
        seeds = f" (seeds {', '.join(str(run['settings'].get('seed', '-')) for run in same)})" if len(same) > 1 else ""
        ended = sum(bool(run["results"]) for run in same)
        seeds += f"; {ended} of {len(same)} evaluated" if ended < len(same) > 1 else ""
        rows.append([", ".join(run["name"] for run in same) + seeds, *(_end(same, *column) for column in columns)])
    return {"titles": ["run", *(f"{figure}, {own}" for own, figure in columns)], "rows": rows}


def _end(runs, prompts, figure):
    """A figure of the evaluation's list `prompts`, before and after, over runs that differ in the seed."""
    values = {
        model: [
            row[figure]
            for run in runs
            for row in run["results"]
            if row["prompts"] == prompts and row["model"] == model and figure in row
        ]
        for model in ("before", "after")
    }
    if not values["after"]:
        return "-"
    mean, low, high = interval(values["after"])
    span = "" if len(values["after"]) < 2 else f" [{low:.3f}, {high:.3f}]"
    return f"{sum(values['before']) / len(values['before']):.3f} → {mean:.3f}{span}"
