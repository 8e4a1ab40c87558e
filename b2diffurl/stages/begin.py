"""How every step of a stage begins."""

from ..plan import METHODS
from ..run import processes
from ..run.folder import Run, start_log

COMPLETE = {
    "sample": "samples.json",
    "select": "scores.json",
    "fuse": "fused.json",
    "train": "checkpoints",
}  # written last, when all is there


def steps(config):
    """The steps of a stage of config.method, in order."""
    return [step for step in COMPLETE if step != "fuse" or METHODS[config.method].fusion]


def begin(config, step):
    """Open the run for a step of config.stage -> (Run, log), or None where the step is complete already.

    Raises UserError where the run was begun with other settings.
    """
    run = Run(config)
    log = start_log(run)
    run.pin(config)
    done = run.stage / COMPLETE[step]
    if processes.first(done.exists()):
        log.info(f"stage {config.stage} {step}: complete already ({done})")
        return None
    return run, log
