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
PARTS = {  # what the stage's later steps read beside it; once the stage is trained, config.keep may have deleted it
    "sample": ("images", "samples.safetensors"),
    "select": ("selected.safetensors",),
    "fuse": ("fused", "fused.safetensors", "selected.safetensors"),
}
LORA = "checkpoints/checkpoint_1/pytorch_lora_weights.safetensors"


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
    if processes.first(is_complete(config, run.stage, step)):
        log.info(f"stage {config.stage} {step}: complete already ({run.stage / COMPLETE[step]})")
        return None
    return run, log


def is_complete(config, stage, step):
    """Whether a step has left all its files in the stage's folder; a step that lost one is run again."""
    if not (stage / COMPLETE[step]).exists():
        return False
    trained = (stage / LORA).exists()
    later = step == "select" and METHODS[config.method].fusion  # then run_fuse.py writes selected.safetensors
    parts = () if later else PARTS.get(step, ())
    return trained or (step != "train" and all((stage / name).exists() for name in parts))
