"""The house rules that a machine can check. import-linter has the floors themselves."""

import ast
import functools
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "smolforge"
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST_FUNCTION = 50


@functools.cache
def trees():
    return [(path, ast.parse(path.read_text())) for path in FILES]


@functools.cache
def functions():
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [(path, node) for path, tree in trees() for node in ast.walk(tree) if isinstance(node, kinds)]


def body_lines(node):
    """Lines of code: the signature and the docstring do not count."""
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    return node.end_lineno - first.lineno + 1


def test_functions_fit_a_page():
    long = [f"{path.name}:{node.name}" for path, node in functions() if body_lines(node) > LONGEST_FUNCTION]
    assert long == []
    sizes = sorted(body_lines(node) for _, node in functions())
    assert sizes[len(sizes) // 2] <= 10


def test_attention_and_the_loop_are_short():
    sizes = {(path.name, node.name): body_lines(node) for path, node in functions()}
    assert sizes["decoder.py", "forward"] <= 15
    assert sizes["loop.py", "train"] <= 80


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_house_rules(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "each module opens with its story"
    below = "cli" not in path.parts and path.name != "__main__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("hasattr", "eval", "exec")
            literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            assert not (node.func.id == "getattr" and literal)
            assert not (below and node.func.id == "print")
        if isinstance(node, ast.Attribute) and below:
            assert not (node.attr in ("environ", "getenv", "argv") and isinstance(node.value, ast.Name))
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__"
        if isinstance(node, ast.Import):
            assert not {"pickle", "shelve"} & {name.name for name in node.names}


def test_public_functions_say_what_they_do():
    public = [(path, node) for path, node in functions() if not node.name.startswith("_")]
    silent = [
        f"{path.name}:{node.name}" for path, node in public if not ast.get_docstring(node) and body_lines(node) > 12
    ]
    assert silent == []
