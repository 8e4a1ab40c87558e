"""The rooms of the library and the direction of their imports; no pickle on any path; files that can be read."""

import ast
import pathlib

import pytest

from b2diffurl.losses import ALGORITHMS
from b2diffurl.plan import METHODS

ROOT = pathlib.Path("b2diffurl")
LIBRARY = sorted(ROOT.rglob("*.py"))
LEVELS = (  # imports go to earlier levels, or stay within the room; shapes, the world, imports nothing of the others
    "errors ahead adam average schedule noise selection losses step_weights prompt_weights watch gaussian guidance "
    "flow rewards.history seeds shapes",
    "ddim plan value fusion words first_pass",
    "credit rollout",
    "experience run",
    "families",
    "policy rewards",
    "models update",
    "evaluate",
    "report export bench when_decided",
    "stages",
    "study gradient_signal",
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names.split()}
PURE = [
    "schedule",
    "plan",
    "noise",
    "ddim",
    "flow",
    "gaussian",
    "guidance",
    "selection",
    "credit",
    "losses",
    "step_weights",
    "prompt_weights",
    "watch",
    "first_pass",
    "rewards.history",
    "seeds",
]
ARITHMETIC = {"dataclasses", "functools", "hashlib", "math", "typing", "numpy", "torch"}


def imports(path):
    """Every imported name in full, those inside functions too, "from . import x" as the package's x."""
    package = path.parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(name):
    """The room of b2diffurl.a.b: a, or a.b where that has a level of its own; "" for the package itself."""
    parts = name.split(".")[1:]
    return next((own for own in (".".join(parts[:2]), *parts[:1]) if own in LEVEL), "")


def own_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_imports_go_down_only(path):
    here = room(own_name(path))
    assert here or (path.parent == ROOT and path.name in ("__init__.py", "__main__.py"))
    for name in imports(path):
        if name.startswith("b2diffurl.") and (there := room(name)) and there != here:
            assert LEVEL[there] < LEVEL[here], f"{here} imports {there}"
            assert here != "shapes"


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_library_imports_no_entry_point_and_no_pickle(path):
    found = {name.split(".")[0] for name in imports(path)}
    assert not found & {"run_sample", "run_select", "run_train", "config", "pickle"}
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "torch.save"}


@pytest.mark.parametrize("name", PURE)
def test_mathematics_imports_only_arithmetic(name):
    for found in imports(ROOT / f"{name.replace('.', '/')}.py"):
        if found.startswith("b2diffurl."):
            assert room(found) in PURE
        else:
            assert found.split(".")[0] in ARITHMETIC


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_nothing_asks_for_a_method_or_an_algorithm_by_name(path):
    """What one of them asks of the code around it stands in its row of METHODS or of ALGORITHMS."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [leaf for side in (node.left, *node.comparators) for leaf in (side, *getattr(side, "elts", ()))]
            words = {side.value for side in sides if isinstance(side, ast.Constant)}
            assert not words & {*METHODS, *ALGORITHMS}, ast.unparse(node)


@pytest.mark.parametrize("path", [path for path in LIBRARY if "shapes" not in path.parts], ids=str)
def test_files_and_functions_can_be_read(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name != "ddim_step_with_logprob":  # as in other code of DDPO
            own = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            assert len([name for name in own if name != "self"]) <= 6, node.name
