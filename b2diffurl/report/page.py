"""One self-contained HTML page of a run, finished or not: `python -m b2diffurl.report model/lora/<exp_name>`."""

import io
import itertools
import os
import pathlib

import jinja2

from ..errors import UserError
from ..evaluate.before_after import table
from ..plan import METHODS
from ..run import metrics, storage
from . import curves
from .embedded import data_uri, picture
from .fused import strip

CHARTS = (  # title, what it says, step, {figure: label}, against
    ("Reward", "Mean over the stage's images, before that stage's training.", "select", {"reward/mean": ""}, "queries"),
    ("Oracle alignment", "Share of the stage's images that show what their prompt says. Where it parts from "
     "the reward, the reward is gamed.", "select", {"oracle/alignment": ""}, "queries"),
    ("Diversity", "Mean CLIP-feature distance between a prompt's images of different groups. A fall to 0 is a "
     "collapse.", "select", {"diversity/clip": ""}, "queries"),
    ("Reward spread", "Standard deviation over all images, and within branch groups: what the interval decides.",
     "select", {"reward/std": "all", "reward/std_within_groups": "within groups"}, "stage"),
    ("Fused targets", "Mean rewards of the references, of the bases, and of the targets: the bases denoised again with "
     "the references fused in.", "fuse", {"fuse/reference_reward": "references", "fuse/base_reward": "bases",
     "fuse/target_reward": "targets"}, "stage"),
    ("Interval", "How many of the last denoising steps are trained.", "sample", {"interval/length": ""}, "stage"),
    ("Kept samples", "Images that were selected, and those of them whose normalised reward is above 0.", "select",
     {"select/kept": "kept", "select/kept_best": "best"}, "stage"),
    ("Ratio", "The probability ratio of the stage's first update is 1 but for rounding; this is how far it is off.",
     "train", {"policy/ratio_first_error": "largest |ratio - 1|"}, "stage"),
    ("Clip fraction", "Share of transitions beyond the clip range.", "train", {"policy/clipfrac": ""},
     "stage"),
    ("Squared log ratio", "Mean (log ρ)² / 2 to the policy that sampled: about its KL in nats where that is small; "
     "with averaged log-probabilities that KL over the square of the dimensions.", "train", {"policy/approx_kl": ""},
     "stage"),
    ("KL to the base model", "Of a transition, in nats; per dimension with averaged log-probabilities.", "train",
     {"policy/kl_pretrained": ""}, "stage"),
    ("Gradient norm", "Before clipping, mean and largest of a stage's updates. A steady rise comes before a collapse.",
     "train", {"train/grad_norm": "mean", "train/grad_norm_max": "largest"}, "stage"),
)  # fmt: skip
STEPS = ("sample", "select", "fuse", "train")
GROUPS = 6  # of a stage, shown
DASHES = ("-", "--", ":")  # as many as are told apart; with the colours, which repeat later
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d")


def main(folder, out=None):
    """Write <folder>/report.html, or the page `out`, and <folder>/curves.png -> the page's path.

    Raises UserError where there is no run.
    """
    folder = pathlib.Path(folder)
    out = pathlib.Path(out) if out else folder / "report.html"
    records = metrics.read(folder / "metrics.jsonl")
    if not records:
        raise UserError(f"{folder}: no run there (no metrics.jsonl, or an empty one)")
    settings = read(folder / "config.json")
    page = (
        environment()
        .get_template("page.html.j2")
        .render(
            name=folder.name,
            status=status(folder, records),
            charts=charts(records),
            stages=[sheet(folder / f"stage{stage}", stage) for stage in shown_stages(folder)],
            fused=[own for stage in shown_stages(folder) if (own := strip(folder / f"stage{stage}", stage))],
            evaluation=evaluation(folder),
            method=METHODS[settings["method"] if settings else "b2"],
            settings=settings,
            versions=read(folder / "versions.json"),
        )
    )
    aside = out.with_name(out.name + ".tmp")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, out)
    curves.draw(folder)
    return out


def environment():
    """The templates of this folder; what they are given is escaped."""
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def read(path):
    """A JSON file of the run, None where it is not there (yet)."""
    return storage.read_json(path, mend="delete it, or give a new config.exp_name") if path.exists() else None


def status(folder, records):
    """[(what, value)] for the head of the page."""
    stage, step = max((r["stage"], STEPS.index(r["step"])) for r in records)
    settings = read(folder / "config.json") or {}
    planned = settings.get("schedule.stage_count")
    queries = [r["reward/queries"] for r in records if "reward/queries" in r]
    evaluated = (read(folder / "eval.json") or {}).get("settings", {}).get("checkpoint", "")
    plateau = settings.get("schedule.plateau") and f"stage{stage}" in pathlib.Path(evaluated).parts
    over = step == len(STEPS) - 1 and (planned == stage + 1 or plateau)
    state = f"last finished: {STEPS[step]} of stage {stage}"
    if over:
        state = "complete" if evaluated else "trained, and not evaluated"
    return [
        ("state", state),
        ("stages", f"{stage + 1}" + (f" of {planned}" if planned else "")),
        ("reward queries", f"{max(queries, default=0):,}"),
        ("UNet evaluations", f"{sum(r.get('perf/unet_evals', 0) for r in records):,}"),
        ("time", f"{sum(r['time_s'] for r in records) / 60:.1f} min"),
    ]


def charts(records):
    """[{title, says, image}] of every chart that has data; the last one is the time by step."""
    queries = {r["stage"]: r["reward/queries"] for r in records if r["step"] == "select"}
    drawn = []
    for title, says, step, figures, against in CHARTS:
        series = {}
        for figure, label in figures.items():
            points = [(r["stage"], r[figure]) for r in records if r["step"] == step and figure in r]
            if against == "queries":
                points = [(queries[stage], value) for stage, value in points]
            if points:
                series[label] = points
        if series:
            across = "reward queries" if against == "queries" else "stage"
            drawn.append({"title": title, "says": says, "image": line_chart(series, across)})
    times = {step: [(r["stage"], r["time_s"]) for r in records if r["step"] == step] for step in STEPS}
    times = {step: own for step, own in times.items() if own}
    drawn.append({"title": "Time", "says": "Seconds a step, by stage.", "image": line_chart(times, "stage")})
    return drawn


def line_chart(series, across):
    """{label: [(x, y)]} -> an SVG as a data URI."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 2.7))
    figure.subplots_adjust(0.15, 0.19, 0.97, 0.95)  # a layout engine takes as long as all else
    axes = figure.add_subplot()
    for (label, points), colour, dashes in zip(series.items(), itertools.cycle(COLOURS), itertools.cycle(DASHES)):
        axes.plot(*zip(*sorted(points), strict=True), marker=".", color=colour, linestyle=dashes, label=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_xlabel(across)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(series) > 1:
        axes.legend(frameon=False, fontsize="small")
    stream = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(stream)
    return data_uri(stream.getvalue(), "svg+xml")


def shown_stages(folder):
    """The first, the middle and the last of the stages that are scored and still have their pictures."""
    found = sorted(
        int(path.parent.name.removeprefix("stage"))
        for path in folder.glob("stage*/scores.json")
        if (path.parent / "images").is_dir()
    )
    return sorted({found[0], found[len(found) // 2], found[-1]}) if found else []


def sheet(folder, stage):
    """{stage, groups}: its first branch groups, every ending with its reward and whether it was kept."""
    rows, groups = storage.read_json(folder / "scores.json", "run_select.py", "scores"), {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return {
        "stage": stage,
        "groups": [
            {"prompt": group[0]["prompt"], "images": [tile(folder, row, group) for row in group]}
            for group in list(groups.values())[:GROUPS]
        ],
    }


def tile(folder, row, group):
    """One image of a group: picture, reward, normalised reward, and "best" or "worst" where it is that and was kept."""
    rewards = [other["reward"] for other in group]
    kept = ""
    if row["kept"] and min(rewards) < max(rewards):
        kept = {max(rewards): "best", min(rewards): "worst"}.get(row["reward"], "")
    return {
        "image": picture(folder / "images" / pathlib.Path(row["image"]).name),
        "reward": row["reward"],
        "normalised": row["normalised"],
        "kept": kept,
    }


def evaluation(folder):
    """{table, image} of the before/after evaluation, None where it was not made yet."""
    stored = read(folder / "eval.json")
    if stored is None:
        return None
    image = folder / "before_after.png"
    return {
        "table": table(stored["results"]), "image": data_uri(image.read_bytes(), "png") if image.exists() else None,
    }  # fmt: skip
