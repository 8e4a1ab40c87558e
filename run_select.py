"""Score and select a stage's images: python run_select.py --config config/stage_process.py:PRESET --config.stage=I."""

from b2diffurl import STARTED
from b2diffurl.run.command import run_main


def main(config):
    from b2diffurl.stages import select

    select.main(config, STARTED)


if __name__ == "__main__":
    run_main(main, locked=True)
