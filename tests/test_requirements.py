"""What is installed: every import is named, what comes with it has its locked version, one command runs all others."""

import importlib.metadata as metadata
import pathlib
import platform
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_architecture import LIBRARY, imports

ROOT = pathlib.Path(__file__).parents[1]


def named(file):
    """{canonical name: version} of a requirements file."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_every_import_is_named_in_the_requirements():
    files = [*LIBRARY, *pathlib.Path().glob("*.py"), *pathlib.Path().glob("config/*.py")]
    found = {name.split(".")[0] for path in files for name in imports(path)}
    foreign = found - set(sys.stdlib_module_names) - {"", "b2diffurl"}
    owners = metadata.packages_distributions()
    needed = {canonicalize_name(owners[name][0]) for name in foreign if name in owners}
    assert {"torch", "absl-py", "pillow", "huggingface-hub"} <= needed
    assert needed <= named("requirements.txt").keys()


@pytest.mark.skipif(
    (sys.platform, platform.machine(), sys.version_info[:2]) != ("linux", "x86_64", (3, 11)),
    reason="the lock is of Linux x86-64 with Python 3.11",
)
def test_the_lock_has_everything_that_the_requirements_bring():
    wanted, seen = [*named("requirements.txt"), *named("requirements-dev.txt")], {}
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen[name] = metadata.version(name)
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
            wanted += [canonicalize_name(own.name) for own in needs if not own.marker or own.marker.evaluate()]
    locked = named("requirements.lock")
    assert len(seen) > 40
    assert {name: version.partition("+")[0] for name, version in seen.items()} == {n: locked.get(n) for n in seen}


@pytest.mark.parametrize("arguments", [["select", "--config.stage=100"], ["evaluate"], ["report", "--help"]])
def test_one_command_runs_the_others(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "b2diffurl", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    wanted = {"select": "run_select.py: config.stage=100", "evaluate": "evaluate: --checkpoint is missing"}
    assert wanted.get(arguments[0], "usage") in said
    assert (done.returncode == 0) == (arguments[0] == "report")


def test_one_command_says_what_it_knows(tmp_path):
    run = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-m", "b2diffurl", "paint"], cwd=ROOT, **run)
    assert re.search("usage: b2diffurl COMMAND .*process, sample, select, fuse, train", done.stderr)
    elsewhere = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[1:] = ['report']; from b2diffurl.__main__ import main; main()"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, **run,
    )  # fmt: skip
    assert f"no config/stage_process.py here; go to {ROOT}" in elsewhere.stderr
