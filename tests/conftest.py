"""Small real models shared by the tests; nothing here reaches the network."""

import os
import pathlib
import resource

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; for a GPU: bench --gpu-check
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models as small as these a second thread costs more than it brings
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait soon leave the core to other processes

import pytest
from small import build_unet

from b2diffurl.shapes import diffusion


def cpu_seconds():
    """User and system time of this process and of those that it started and that have ended."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


BEGUN = cpu_seconds()  # an installation by tests/run.sh is not the tests'
SPENT, STEPS = {}, ("sample", "select", "fuse", "train")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = cpu_seconds()
    result = yield
    SPENT[item.nodeid] = cpu_seconds() - before
    return result


def pytest_terminal_summary(terminalreporter):
    """Where the CPU time went: on a slow machine, or beside other work, the clock does not tell."""
    terminalreporter.write_sep("=", "most CPU time")
    for name, seconds in sorted(SPENT.items(), key=lambda entry: -entry[1])[:15]:
        terminalreporter.write_line(f"{seconds:6.1f} s  {name}")
    terminalreporter.write_line(f"{cpu_seconds() - BEGUN:6.1f} s  in all, user and system")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory of the test's own, with the repository's files: runs write log/ below it."""
    (tmp_path / "model").mkdir()  # where runs go, too
    names = ("config", "model/shapes", "model/shapes_flow", "prompts", "b2diffurl", "run_process.sh")
    for name in (*names, *(f"run_{step}.py" for step in STEPS)):
        (tmp_path / name).symlink_to(pathlib.Path(name).resolve())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scheduler():
    made = diffusion.build_scheduler()
    made.set_timesteps(20)
    return made


@pytest.fixture(scope="session")
def unet():
    return build_unet()
