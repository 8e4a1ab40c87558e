"""`python -m b2diffurl.report model/lora/<exp_name>`: see page.py."""

import json
import pathlib
import sys

from ..errors import UserError
from .page import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m b2diffurl.report model/lora/<exp_name>")
    try:
        main(sys.argv[1])
    except (UserError, json.JSONDecodeError, OSError) as error:
        sys.exit(f"report: {error}")
    print(pathlib.Path(sys.argv[1]) / "report.html")
