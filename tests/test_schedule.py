"""Backward progressive training against the paper's run and against exact fractions."""

import os
import pathlib
import shutil
import subprocess
import sys
from fractions import Fraction
from math import floor

import pytest

from b2diffurl.schedule import interval, interval_length


def test_paper_run_changes_at_the_known_stages():
    lengths = [interval_length(i, 100, 14, 20) for i in range(100)]
    assert lengths[0] == 14
    assert lengths[-1] == 20
    assert [i for i in range(1, 100) if lengths[i] != lengths[i - 1]] == [15, 29, 43, 58, 72, 86]


@pytest.mark.parametrize(("count", "left", "right"), [(1, 20, 20), (7, 1, 20), (13, 17, 20), (3, 2, 9), (100, 5, 5)])
def test_length_is_the_formula_in_exact_arithmetic(count, left, right):
    for i in range(count):
        wanted = left + floor(Fraction(i * (right - left + 1), count))
        assert interval_length(i, count, left, right) == wanted
        assert left <= wanted <= right


def test_growing_interval_is_a_suffix_and_constant_is_the_longest():
    assert interval("growing", 0, 100, 14, 20, 20) == (6, 20)
    assert interval("growing", 99, 100, 14, 20, 20) == (0, 20)
    assert {interval("constant", i, 10, 14, 18, 20) for i in range(10)} == {(2, 20)}


@pytest.mark.parametrize("arguments", [(-1, 10, 1, 2), (10, 10, 1, 2), (0, 10, 0, 2), (0, 10, 3, 2)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=r"must be in|need 1"):
        interval_length(*arguments)


def test_interval_longer_than_the_steps():
    with pytest.raises(ValueError, match="longer"):
        interval("growing", 0, 10, 14, 21, 20)
    with pytest.raises(ValueError, match="kind"):
        interval("shrinking", 0, 10, 14, 20, 20)


def test_the_picture_of_the_method_is_what_its_script_draws(tmp_path):
    """docs/method.svg has the schedule's own numbers."""
    script = tmp_path / "docs/draw_method.py"
    script.parent.mkdir()
    shutil.copy("docs/draw_method.py", script)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, script], check=True, env=environment)
    assert script.with_name("method.svg").read_text() == pathlib.Path("docs/method.svg").read_text()
