"""metrics.jsonl: one JSON object a line, one line a (stage, step)."""

import json
import os


def read(path):
    """All records of a metrics.jsonl, in order; an empty list where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(path, config, step, values):
    """Add a step's line, in place of one that an interrupted try at the same stage and step left."""
    line = {"stage": config.stage, "step": step, **values}
    others = [r for r in read(path) if (r["stage"], r["step"]) != (config.stage, step)]
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(json.dumps(r, allow_nan=False) + "\n" for r in [*others, line]), encoding="utf-8")
    os.replace(aside, path)


def track(config, step, values, log):
    """Send a finished step's line to Weights & Biases where config.log_with asks for it: one run per experiment.

    Called when the step's files are in place; a failure there is a warning and costs nothing here.
    """
    if config.log_with != "wandb":
        return
    try:
        import wandb

        name = config.exp_name
        run = wandb.init(project="b2diffurl", id=name, name=name, config=config.to_dict(), resume="allow")
        run.log({"stage": config.stage, "step": step, **values})
        run.finish(quiet=True)
    except Exception as error:
        log.warning(f"stage {config.stage} {step}: not sent to wandb ({error})")
