"""The loop of run_process.sh in one warm process: the same three steps and the evaluation, Python started once.

Where a stage is short, three starts of Python with PyTorch, diffusers and OpenCLIP cost more than its work does.
"""

import gc
import time

from . import STARTED, distributed, evaluate, files, report, sample, select, train
from .configuration import run_main


def main(config):
    """Run every stage that is not complete, then the evaluation. Each step loads its models and lets them go."""
    started = STARTED
    for stage in range(config.schedule.stage_count):
        config.stage = stage
        run = files.Run(config)
        if distributed.first((run.stage / "checkpoints").is_dir()):
            if distributed.rank() == 0:
                print(f"stage {stage}: complete already", flush=True)
            continue
        for step in (sample, select, train):
            step.main(config, started)
            gc.collect()  # PEFT's layers refer to each other; without this the next step's models come on top of them
            started = time.perf_counter()
    evaluate.main(config, files.checkpoint(run.stage), run.folder)
    if distributed.rank() == 0:
        report.main(run.folder)


if __name__ == "__main__":
    run_main(main, locked=True)
