"""What run_process.sh asks before it starts; the last line is "<stages> <steps or "one"> <plateau> <run folder>"."""

from ..plan import METHODS
from ..run.command import run_main
from ..run.config import is_url, reward_terms
from ..run.folder import Run
from ..run.prompts import read_prompts
from .begin import steps


def main(config):
    """Find out what would stop the run much later; then print stages, a stage's processes, config.schedule.plateau, and
    the run's folder.

    The processes are "one" of all steps, or the steps that have one each: sample,select,train.
    """
    run = Run(config)
    run.check(config)
    for name, _ in reward_terms(config.reward.name):
        if ":" in name and not is_url(name):  # a user's function
            from ..rewards import user_function

            user_function(name)
    if METHODS[config.method].fusion:
        from ..families import load_family
        from .targets import word_thresholds

        word_thresholds(config, load_family(config), read_prompts(config.prompts.train))
    if config.evaluate.lpips or config.evaluate.inception_score:  # may have to be downloaded
        from ..evaluate.measures import Quality

        Quality(config, "cpu")
    processes = "one" if config.one_process else ",".join(steps(config))
    print(config.schedule.stage_count, processes, config.schedule.plateau, run.folder)


if __name__ == "__main__":
    run_main(main)
