"""Sample branch groups of one stage: python run_sample.py --config config/stage_process.py:PRESET --config.stage=I."""

from b2diffurl import STARTED
from b2diffurl.run.command import run_main


def main(config):
    from b2diffurl.stages import sample

    sample.main(config, STARTED)


if __name__ == "__main__":
    run_main(main, locked=True)
