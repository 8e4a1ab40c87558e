"""`python -m b2diffurl.evaluate`: see before_after.py."""

from ..run.command import run_main
from .before_after import main

if __name__ == "__main__":
    run_main(main, checkpoint=None, out=None, prompts="", images_per_prompt="", batch_size="")
