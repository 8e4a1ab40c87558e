"""Make a stage's fused targets: python run_fuse.py --config config/stage_process.py:PRESET --config.stage=I.

For config.method=dfusion alone, after run_select.py.
"""

from b2diffurl import STARTED
from b2diffurl.run.command import run_main


def main(config):
    from b2diffurl.stages import fuse

    fuse.main(config, STARTED)


if __name__ == "__main__":
    run_main(main, locked=True)
