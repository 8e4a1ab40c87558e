"""The two forbidden directions of import, and no pickle on any path."""

import ast
import pathlib

import pytest

LIBRARY = sorted(pathlib.Path("b2diffurl").rglob("*.py"))
MATHEMATICS = ["schedule", "ddim", "rewards/history", "selection", "losses", "noise", "guidance"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{'.' * node.level}{node.module or ''}"
            yield from (f"{'.' * node.level}{alias.name}" for alias in node.names if not node.module)


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_library_imports_no_entry_point_and_no_pickle(path):
    found = {name.split(".")[0] for name in imports(path)}
    assert not found & {"run_sample", "run_select", "run_train", "config", "pickle"}
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "torch.save"}


@pytest.mark.parametrize("name", MATHEMATICS)
def test_mathematics_imports_only_arithmetic(name):
    assert set(imports(pathlib.Path(f"b2diffurl/{name}.py"))) <= {"math", "hashlib", "numpy", "torch"}
