"""The loop of run_process.sh in one warm process: the same steps and the evaluation, with the same bits.

Python starts once and every model is loaded once: three starts per stage with PyTorch, diffusers, OpenCLIP and
gigabytes of weights cost more than the work of a stage that is short or spread over several GPUs.
"""

import time

from .. import STARTED
from ..average import evaluated
from ..errors import UserError
from ..evaluate import before_after
from ..models import Models
from ..report import page
from ..run import processes
from ..run.command import run_main
from ..run.folder import Run, start_log
from . import fuse, sample, select, train
from .begin import is_complete, steps
from .plateau import reached


def run_stage(config, started=None, loaded=None):
    """The steps of config.stage; started: as the steps take it; loaded: their Models, the stage's own unless given."""
    loaded = loaded or Models(config)
    mains = {"sample": sample.main, "select": select.main, "fuse": fuse.main, "train": train.main}
    for step in steps(config):
        mains[step](config, started, loaded)
        started = None


def main(config):
    """Run every stage that is not complete, up to a plateau, then the evaluation."""
    started, loaded = STARTED, Models(config)
    for stage in range(config.schedule.stage_count):
        config.stage = stage
        complete = processes.first(is_complete(config, Run(config).stage, "train"))
        if not complete and processes.first(reached(config)):
            over = 2 * config.schedule.plateau
            log = start_log(Run(config))
            log.info(f"stage {stage} is not begun: the reward has not risen over the last {over} stages")
            break
        run = Run(config)
        if complete:
            if processes.rank() == 0:
                print(f"stage {stage}: complete already", flush=True)
            continue
        run_stage(config, started, loaded)
        _report(run)
        started = time.perf_counter()
    before_after.main(config, evaluated(config, run.checkpoint), run.folder, loaded=loaded)
    _report(run)


def _report(run):
    """Write report.html; the run goes on without it."""
    if processes.rank():
        return
    try:
        page.main(run.folder)
    except (UserError, OSError) as error:
        print(f"report.html was not written: {error}", flush=True)


if __name__ == "__main__":
    run_main(main, locked=True)
