"""What run_process.sh asks before it starts; the last line is "<stages> <one|three> <run folder>"."""

from ..run.command import run_main
from ..run.config import is_url, reward_terms
from ..run.folder import Run


def main(config):
    """Find out what would stop the run much later; then print stages, processes per stage, and the run's folder."""
    run = Run(config)
    run.check(config)
    for name, _ in reward_terms(config.reward.name):
        if ":" in name and not is_url(name):  # a user's function
            from ..rewards import user_function

            user_function(name)
    if config.evaluate.lpips or config.evaluate.inception_score:  # may have to be downloaded
        from ..evaluate.measures import Quality

        Quality(config, "cpu")
    print(config.schedule.stage_count, "one" if config.one_process else "three", run.folder)


if __name__ == "__main__":
    run_main(main)
