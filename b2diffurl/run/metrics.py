"""metrics.jsonl: one JSON object a line, one line a (stage, step)."""

import json
import os

from ..errors import UserError


def read(path):
    """All records of a metrics.jsonl, in order; an empty list where there is none. UserError for a broken line."""
    if not path.exists():
        return []
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} has a line that is no JSON object ({error}): delete that line, or give a new config.exp_name"
        ) from None


def time_left(path, config, step, steps):
    """What a step's line in the log ends with: the time from there to the evaluation, by the mean of each step so far.

    steps: a stage's, in order. "" before a metrics.jsonl has every one of them.
    """
    took = {name: [] for name in steps}
    for line in read(path):
        took[line["step"]].append(line["time_s"])
    if not all(took.values()):
        return ""
    means = [sum(own) / len(own) for own in took.values()]
    stages = config.schedule.stage_count - config.stage - 1
    return f"; {duration(stages * sum(means) + sum(means[steps.index(step) + 1 :]))} to the evaluation"


def duration(seconds):
    """Seconds as people say them."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def record(path, config, step, values):
    """Add a step's line, in place of one that an interrupted try at the same stage and step left."""
    line = {"stage": config.stage, "step": step, **values}
    others = [r for r in read(path) if (r["stage"], r["step"]) != (config.stage, step)]
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(json.dumps(r, allow_nan=False) + "\n" for r in [*others, line]), encoding="utf-8")
    os.replace(aside, path)
