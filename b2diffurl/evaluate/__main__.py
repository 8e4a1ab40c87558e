"""`python -m b2diffurl.evaluate`: see before_after.py."""

from ..errors import UserError
from ..run.command import run_main
from .before_after import main


def command(config, checkpoint, out, prompts, images_per_prompt, batch_size):
    """The evaluation with the flags' numbers of images and sizes of batches, where they are given."""
    if images_per_prompt:
        config.evaluate.images_per_prompt = _positive("images_per_prompt", images_per_prompt)
    if batch_size:
        config.sample.batch_size = _positive("batch_size", batch_size)
    main(config, checkpoint, out, prompts)


def _positive(flag, text):
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--{flag} {text}: must be a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    run_main(command, checkpoint=None, out=None, prompts="", images_per_prompt="", batch_size="")
