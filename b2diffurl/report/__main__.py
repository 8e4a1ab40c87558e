"""`python -m b2diffurl.report RUN [RUN ...] [--out FILE]`: one run's page (page.py), or several on one (compare.py)."""

import argparse
import json
import sys

from ..errors import UserError
from . import compare, page


def main(runs, out):
    """Write the page `out`, of a single run report.html in its folder unless it is given -> its path."""
    if len(runs) == 1:
        return page.main(runs[0], out)
    if not out:
        raise UserError("several runs: give --out compare.html")
    compare.main(runs, out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.report", description="A run on a page.")
    parser.add_argument("runs", nargs="+", metavar="model/lora/NAME", help="folders of runs")
    parser.add_argument("--out", help="the page; needed for several runs")
    arguments = parser.parse_args()
    try:
        print(main(arguments.runs, arguments.out))
    except (UserError, json.JSONDecodeError, OSError) as error:
        sys.exit(f"report: {error}")
