"""The command of the study, which writes results.csv, table.md and curves.png into DIR/quick, DIR/search or DIR/full,
for another world into those of DIR/WORLD.

`python -m b2diffurl.study [--quick | --search] [--out DIR] [--rows ALGORITHM:METHOD ...] [--seeds N ...]
[--world WORLD] [--set NAME=VALUE ...]`; the same command goes on where it was stopped.
"""

import argparse
import pathlib
import sys

from .. import study
from ..errors import UserError
from .matrix import WORLDS
from .runs import main


def assignment(text):
    """(field, value), both text, of a NAME=VALUE argument; ArgumentTypeError for any that cannot be given."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=VALUE, for example schedule.left=18")
    if name in ("exp_name", "save_path", "stage", "seed", "method", "train.algorithm"):
        raise argparse.ArgumentTypeError(f"{name} is what tells the runs apart: see --rows and --seeds, --out")
    return name, value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.study", description=study.__doc__)
    parser.add_argument("--out", default="model/study", type=pathlib.Path, help="folder of the results and the runs")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--quick", action="store_true", help="a small matrix of short runs: minutes, no evidence")
    kinds.add_argument("--search", action="store_true", help="every setting of the grid, on other prompts and seeds")
    parser.add_argument("--rows", nargs="+", default=(), help="only these, as algorithm:method")
    parser.add_argument("--seeds", nargs="+", type=int, default=(), help="these instead of the study's own")
    parser.add_argument("--world", default="shapes", choices=WORLDS, help="the preset of the runs")
    parser.add_argument(
        "--set",
        nargs="+",
        type=assignment,
        default=(),
        metavar="NAME=VALUE",
        help="for all runs, as in schedule.left=18; into a DIR of their own",
    )
    given = parser.parse_args()
    kind = "quick" if given.quick else "search" if given.search else "full"
    try:
        place = given.out if given.world == "shapes" else given.out / given.world
        main(place / kind, kind, given.rows, given.seeds, given.set, given.world)
    except UserError as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
