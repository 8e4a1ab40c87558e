"""`python -m b2diffurl.export CHECKPOINT --out FILE [--format diffusers|kohya] [--card] [--push USER/NAME]`

Writes the LoRA of a checkpoint folder (stage<i>/checkpoints/checkpoint_1 of a run) as one file for other programs.
--card puts a model card, README.md, and the run's pictures beside it; --push uploads all that to the hub.
"""

import argparse
import pathlib
import shutil
import sys

from ..average import FOLDER
from ..errors import UserError
from ..run.folder import checkpoint_of
from ..run.storage import read_tensors, write_tensors

NAME = "pytorch_lora_weights.safetensors"  # of the LoRA in a checkpoint folder

CARD = "library_name: diffusers"  # a line that only a model card has


def export(checkpoint, out, form):
    """Write the checkpoint folder's LoRA to the file `out` in a form: diffusers or kohya -> its denoiser's class.

    Raises UserError.
    """
    from safetensors import safe_open

    source = checkpoint / NAME
    lora = read_tensors(source, "run_train.py")
    with safe_open(source, "pt") as stored:
        metadata = stored.metadata() or {}
    denoiser = metadata.get("denoiser", "")
    if form == "kohya":
        from . import kohya

        lora = kohya.convert(lora, denoiser)
        metadata |= kohya.header(lora, denoiser)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(out, lora, metadata)
    return denoiser


def push(repository, files):
    """Upload files to the root of a hub repository, which is made where it is not there yet."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        for path in files:
            api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repository)
    except Exception as error:  # its HTTP library is another one by version
        raise UserError(f"--push {repository}: {error}; {files[0]} is written, the same command uploads it") from None


def _beside(path, folder):
    """The file's copy in the folder, which may be its own."""
    return path if path.parent.resolve() == folder.resolve() else pathlib.Path(shutil.copy(path, folder))


def main(arguments):
    """What the command does; arguments: see the parser below. Raises UserError."""
    checkpoint, out = arguments.checkpoint, arguments.out
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: must be a file that ends in .safetensors")
    page, place = out.parent / "README.md", checkpoint.resolve()
    stage = (place.parent if place.name == FOLDER else place).parent.parent
    trained = checkpoint_of(stage).resolve() in (place, place.parent)
    if arguments.card and not (trained and stage.name.removeprefix("stage").isdecimal()):
        raise UserError(
            f"{checkpoint}: --card needs a run's stage<i>/checkpoints/checkpoint_1, which tells how it was made"
        )
    if arguments.card and page.exists() and CARD not in page.read_text(encoding="utf-8"):
        raise UserError(f"{page} is no model card, and would be lost: give --out a folder of its own")
    denoiser = export(checkpoint, out, arguments.format)
    files = [out]
    if arguments.card:
        from . import card

        own = {"file": out.name, "form": arguments.format, "denoiser": denoiser, "repository": arguments.push or ""}
        pictures = card.write(stage.parent, int(stage.name.removeprefix("stage")), checkpoint, own, page)
        files += [page, *(_beside(path, out.parent) for path in pictures)]
    if arguments.push:
        push(arguments.push, files)
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.export", description=__doc__.split("\n\n")[1])
    parser.add_argument("checkpoint", type=pathlib.Path, help="a run's stage<i>/checkpoints/checkpoint_1")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the file to write")
    parser.add_argument("--format", choices=("diffusers", "kohya"), default="diffusers", help="of the file")
    parser.add_argument("--card", action="store_true", help="write a model card beside it")
    parser.add_argument("--push", metavar="USER/NAME", help="upload to the hub, with the token of `hf auth login`")
    try:
        main(parser.parse_args())
    except (UserError, OSError) as error:  # no room, no token of the hub
        sys.exit(f"export: {error}")
