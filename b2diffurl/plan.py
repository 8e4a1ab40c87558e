"""What run_process.sh asks before it starts: checks the configuration and prints "<stage count> <run folder>"."""

import pathlib

from .configuration import run_main


def main(config):
    """Print the number of stages and the run's folder."""
    if config.reward.name != "clip":  # a user's function: find out now that it is missing, not after a stage of images
        from .rewards import load_reward

        load_reward(config, "cpu")
    print(config.schedule.stage_count, pathlib.Path(config.save_path) / config.exp_name)


if __name__ == "__main__":
    run_main(main)
