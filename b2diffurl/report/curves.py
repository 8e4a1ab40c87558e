"""curves.png of a run: reward, oracle, kept samples, ratio and gradient norm by stage, from metrics.jsonl."""

import os

from ..run import metrics

PANELS = (
    ("select", "reward/mean", "mean reward"),
    ("select", "oracle/alignment", "oracle alignment of the stage's images"),
    ("select", "reward/std_within_groups", "reward std within branch groups"),
    ("select", "select/kept", "samples kept"),
    ("train", "policy/approx_kl", "approximate KL to the sampling policy"),
    ("train", "train/grad_norm", "gradient norm"),
)


def draw(folder):
    """Write <folder>/curves.png of a run's folder, atomically; panels without data are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = metrics.read(folder / "metrics.jsonl")
    lengths = {r["stage"]: r["interval/length"] for r in records if "interval/length" in r}
    series = [
        (title, [(r["stage"], r[key]) for r in records if r["step"] == step and key in r])
        for step, key, title in PANELS
    ]
    series = [(title, points) for title, points in series if points]
    if not series:
        return
    rows = -(-len(series) // 2)
    figure = Figure(figsize=(11, 2.6 * rows))
    figure.subplots_adjust(0.07, 0.2 / rows, 0.98, 1 - 0.12 / rows, wspace=0.15, hspace=0.6)
    for i, (title, points) in enumerate(series):
        axes = figure.add_subplot(rows, 2, i + 1)
        axes.plot(*zip(*points, strict=True), marker=".")
        for stage, length in lengths.items():
            if stage and lengths.get(stage - 1) != length:
                axes.axvline(stage - 0.5, color="0.8", zorder=0)
        axes.set(title=title, xlabel="stage (a line: the interval grows)")
    aside = folder / "curves.tmp.png"
    FigureCanvasAgg(figure).print_png(aside)
    os.replace(aside, folder / "curves.png")
