"""README and docs: what they tell people to type and to open is there."""

import ast
import pathlib
import re

import ml_collections
import pytest

from b2diffurl.__main__ import COMMANDS
from config.stage_process import get_config

PAGES = [pathlib.Path(name) for name in ("README.md", "model/shapes/README.md", "model/shapes_flow/README.md")]
PAGES += sorted(pathlib.Path("docs").rglob("*.md"))
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
WITHOUT = (  # for few: no short name
    "b2diffurl.bench.memory", "b2diffurl.bench.rehearsal", "b2diffurl.shapes.flow", "b2diffurl.report.fused",
)  # fmt: skip
PLACEHOLDER = re.compile(r"[A-Z]+$")  # FILE, NAME, S: for the reader to fill in
FLAG = re.compile(r"--config\.([\w.]+)=((?:\"[^\"`]*\"|[^\s`|\"])*)")


def flags():
    """[(page, field, value as it is typed)] of every setting that a page shows."""
    return [(page, *found) for page, text in TEXT.items() for found in FLAG.findall(text)]


def test_there_is_something_to_check():
    assert len(flags()) > 30
    assert {page.name for page, _, _ in flags()} >= {
        "README.md",
        "gpu.md",
        "families.md",
        "algorithms.md",
        "rewards.md",
    }


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_settings_exist_and_take_their_values(page):
    for _, field, value in (own for own in flags() if own[0] == page):
        known = get_config("shapes")
        for name in field.split("."):
            assert name in known, f"{page}: no setting {field}"
            known = known[name]
        if value and not PLACEHOLDER.match(value) and "|" not in value and not isinstance(known, str):
            given = ast.literal_eval(ast.literal_eval(value) if value[0] == '"' else value)
            given = float(given) if isinstance(known, float) else given
            assert isinstance(given, type(known)), f"{page}: {field}={value}"
        assert not isinstance(known, ml_collections.ConfigDict)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_exist_with_their_options(page):
    for command in re.findall(r"python -m (b2diffurl[\w.]*)((?:[^`\n#]|\\\n|\n(?=\S[^\n`]*`))*)", TEXT[page]):
        module, rest = command
        place = pathlib.Path(module.replace(".", "/"))
        (file,) = [own for own in (place / "__main__.py", place.with_suffix(".py")) if own.is_file()]
        code = file.read_text()
        assert module.removeprefix("b2diffurl.") in COMMANDS or module in WITHOUT, f"{page}: b2diffurl has no {module}"
        for option in re.findall(r"--([a-z_-]+)(?![\w.-]|\.)", re.sub(r"--config\S*", "", rest)):
            names = rf'"--{option}"|\b{option}=(?:None|"|\d)'  # of argparse, or of run_main
            assert re.search(names, code), f"{page}: {module} has no --{option}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_scripts_exist(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXT[page]):
        assert link.startswith("http") or (page.parent / link).exists(), f"{page}: no {link}"
    for script in re.findall(r"(?:bash|python) ((?:tests|docs)/[\w./]+|run_\w+\.(?:sh|py))", TEXT[page]):
        assert pathlib.Path(script).is_file(), f"{page}: no {script}"
    for preset in re.findall(r"PRESET=([a-z][\w.]*[\w])|stage_process\.py:([a-z][\w.]*[\w])", TEXT[page]):
        get_config(preset[0] or preset[1])
