"""Draws docs/method.svg, the method in one picture: `python docs/draw_method.py`, from the repository's root.

Above: one branch group, T denoising steps from noise to images. Below: the steps that each stage trains, by the
schedule's own code with the paper's numbers.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from b2diffurl.schedule import interval

STEPS, LEFT, RIGHT, STAGES, BRANCHES = 20, 14, 20, 100, 5
X0, DX = 110, 30  # of the first state, and from state to state
SHARED, SPREAD, TOP = 110, 36, 38  # height of the shared beginning, between branches, of the first branch
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2937; }
.soft { fill: #6b7280; font-size: 13px; }
.line { stroke: #9ca3af; stroke-width: 2; fill: none; }
.state { fill: #9ca3af; }
.trained { stroke: #2563eb; }
.best { stroke: #059669; fill: #059669; }
.worst { stroke: #dc2626; fill: #dc2626; }
text.best, text.worst { stroke: none; }
.off { fill: #e5e7eb; }
.on { fill: #2563eb; }
@media (prefers-color-scheme: dark) {
  text { fill: #e5e7eb; } .soft { fill: #9ca3af; } .line { stroke: #6b7280; } .state { fill: #6b7280; }
  .trained { stroke: #60a5fa; } .best { stroke: #34d399; fill: #34d399; } .worst { stroke: #f87171; fill: #f87171; }
  .off { fill: #374151; } .on { fill: #60a5fa; }
}
"""


def text(x, y, words, kind="", anchor="start"):
    """A line of text."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def group():
    """The branch group: a shared beginning, branches, the best and the worst."""
    split, end = X0 + DX * (STEPS - LEFT), X0 + DX * STEPS
    parts = [
        f'<path class="line" d="M{X0} {SHARED}H{split}"/>',
        text(X0, SHARED - 14, "noise x<tspan dy='4' style='font-size: 10px'>T</tspan>", "soft"),
    ]
    kinds = {0: "best", 3: "worst"}
    for branch in range(BRANCHES):
        y, kind = TOP + SPREAD * branch, kinds.get(branch, "")
        path = f"M{split} {SHARED}C{split + 40} {SHARED} {split + 30} {y} {split + 75} {y}H{end}"
        parts.append(f'<path class="line {"trained" if kind else ""}" d="{path}"/>')
        parts += [f'<circle class="state" cx="{X0 + DX * k}" cy="{y}" r="3"/>' for k in range(STEPS - LEFT + 3, STEPS)]
        parts.append(f'<rect class="{kind or "state"}" x="{end}" y="{y - 11}" width="22" height="22" rx="4"/>')
        label = {"best": "best: more likely", "worst": "worst: less likely"}.get(kind)
        parts += [text(end + 32, y + 5, label, kind)] if label else []
    parts += [f'<circle class="state" cx="{X0 + DX * k}" cy="{SHARED}" r="3"/>' for k in range(STEPS - LEFT + 1)]
    below = TOP + SPREAD * BRANCHES + 4
    parts.append(text((X0 + split) / 2, below, "denoised once, shared", "soft", "middle"))
    parts.append(text((split + end) / 2, below, "the interval: what differs, and what is trained", "soft", "middle"))
    return parts


def stages(top):
    """Rows of steps, the trained ones filled, for some stages."""
    parts = [text(X0, top, f"Backward: the interval grows from the last {LEFT} steps to all {RIGHT}")]
    for row, stage in enumerate((0, STAGES // 3, 2 * STAGES // 3, STAGES - 1)):
        start, y = interval("growing", stage, STAGES, LEFT, RIGHT, STEPS)[0], top + 16 + 24 * row
        parts.append(text(X0 - 12, y + 13, f"stage {stage}", "soft", "end"))
        for step in range(STEPS):
            kind = "on" if step >= start else "off"
            parts.append(f'<rect class="{kind}" x="{X0 + DX * step}" y="{y}" width="{DX - 4}" height="16" rx="3"/>')
    return parts


if __name__ == "__main__":
    body = [*group(), *stages(270)]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 390" role="img"><style>{STYLE}</style>'
    title = "<title>A branch group, and the interval that grows backward stage by stage</title>"
    pathlib.Path(__file__).with_name("method.svg").write_text("\n".join([svg, title, *body, "</svg>"]) + "\n")
