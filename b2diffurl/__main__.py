"""`b2diffurl COMMAND ...`, where `pip install -e .` was done: every command of the README by one name."""

import os
import pathlib
import runpy
import sys

SCRIPTS = ("sample", "select", "fuse", "train")  # run_*.py
MODULES = (
    "evaluate",
    "report",
    "export",
    "when_decided",
    "gradient_signal",
    "study",
    "study.benchmark",
    "study.screen",
    "bench",
    "shapes.build",
)  # python -m b2diffurl.*
COMMANDS = ("process", *SCRIPTS, *MODULES)


def main():
    """Run the command that sys.argv names in this process; `process` is run_process.sh, with this Python."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        sys.exit(f"usage: b2diffurl COMMAND ...; the commands are {', '.join(COMMANDS)}")
    if not pathlib.Path("config/stage_process.py").is_file():
        sys.exit(f"b2diffurl: no config/stage_process.py here; go to {pathlib.Path(__file__).parents[1]}")
    if name == "process":
        os.environ.setdefault("PYTHON", sys.executable)
        os.execvp("bash", ["bash", "run_process.sh", *sys.argv[2:]])
    del sys.argv[1]
    sys.path.insert(0, os.getcwd())  # of a reward of one's own, as for python -m
    if name in SCRIPTS:
        sys.argv[0] = f"run_{name}.py"
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(f"b2diffurl.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
