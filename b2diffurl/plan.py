"""What run_process.sh asks before it starts: checks the configuration, prints "<stages> <one|three> <run folder>"."""

from .configuration import reward_parts, run_main
from .files import Run


def main(config):
    """Print the number of stages, the processes that run a stage, and the run's folder."""
    for name, _ in reward_parts(config.reward.name):
        if ":" in name:  # a user's function: find out now that it is missing, not after a stage of images
            from .rewards import user_function

            user_function(name)
    print(config.schedule.stage_count, "one" if config.one_process else "three", Run(config).folder)


if __name__ == "__main__":
    run_main(main)
