"""`python -m b2diffurl.report RUN [RUN ... --out FILE]`: one run's page (page.py), or several on one (compare.py)."""

import argparse
import json
import pathlib
import sys

from ..errors import UserError
from . import compare, page


def main(runs, out):
    """Write report.html into the folder of a single run, or the page `out` of several. -> its path."""
    if len(runs) == 1:
        page.main(runs[0])
        return pathlib.Path(runs[0]) / "report.html"
    if not out:
        raise UserError("several runs: give --out compare.html")
    compare.main(runs, out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.report", description="A run on a page.")
    parser.add_argument("runs", nargs="+", metavar="model/lora/NAME", help="folders of runs")
    parser.add_argument("--out", help="the page of several runs")
    arguments = parser.parse_args()
    try:
        print(main(arguments.runs, arguments.out))
    except (UserError, json.JSONDecodeError, OSError) as error:
        sys.exit(f"report: {error}")
