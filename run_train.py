"""Update the LoRA on a stage's interval: run_train.py --config config/stage_process.py:PRESET --config.stage=I"""

from b2diffurl import STARTED
from b2diffurl.run.command import run_main


def main(config):
    from b2diffurl.stages import train

    train.main(config, STARTED)


if __name__ == "__main__":
    run_main(main, locked=True)
