"""Whether a run ends before its last stage: its reward no longer rises, and every further stage costs queries.

`python -m b2diffurl.stages.plateau --config ... --config.stage=S` is run_process.sh's question: it prints "plateau"
where stage S is not to be begun.
"""

import os

from ..run import metrics, processes
from ..run.command import run_main
from ..run.folder import Run
from ..watch import level


def reached(config):
    """Whether config.stage is not to be begun: over the stages before it reward/mean has not risen.

    Their last config.schedule.plateau against as many before them; with 0 no run ends early.
    """
    lines = [line for line in metrics.read(Run(config).metrics) if line["step"] == "select"]
    means = {line["stage"]: line["reward/mean"] for line in lines if line["stage"] < config.stage}
    return level([means[stage] for stage in sorted(means)], config.schedule.plateau)


def main(config):
    """Print what run_process.sh asks, once on every machine; process 0 decides for all."""
    if processes.first(reached(config)) and os.environ.get("LOCAL_RANK", "0") == "0":
        print("plateau")


if __name__ == "__main__":
    run_main(main)
