"""The code rules that a machine can check. import-linter checks the layers."""

import ast
import functools
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "smolforge"
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST_FUNCTION = 50
VAGUE = {"found", "said", "told", "each", "place", "given", "made", "taken", "there"}
"""Names that say nothing of the thing they are bound to."""
MAX_VAGUE_SHARE = 0.003
MAX_TOP_LEVEL_NAMES = 21
MAX_SOURCE_LINES = 34_281
"""The ledger: lines of Python in the package. It only goes down: what needs more takes as much away elsewhere."""
MAX_POSITIONAL = 3
FIXED_BY_CALLERS = {"forward", "backward", "attend", "masked_attention", "__call__", "__torch_function__"}
"""Called by torch, or as torch's functions are: tensors first, all by position."""
SCRIPTS = {"__main__.py", "worker.py"}
"""They have a command line of their own."""
CALLED_BY_LIBRARIES = {"chat.py", "completion.py", "worker.py", "harness.py"}
"""Gradio, Jinja and lm-eval decide how functions of these files are called."""


@functools.cache
def trees():
    return [(path, ast.parse(path.read_text("utf-8"))) for path in FILES]


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


def test_attention_and_the_training_loop_are_short():
    decoder = dict(trees())[SOURCE / "models" / "decoder.py"]
    (attention,) = (node for node in decoder.body if isinstance(node, ast.ClassDef) and node.name == "Attention")
    (forward,) = (node for node in attention.body if isinstance(node, ast.FunctionDef) and node.name == "forward")
    (train,) = (node for path, node in functions() if path == SOURCE / "training" / "loop.py" and node.name == "train")
    assert body_lines(forward) <= 15
    assert body_lines(train) <= 80


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_modules_follow_the_code_rules(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), "each module opens with its story"
    below = "cli" not in path.parts and path.name not in SCRIPTS
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("hasattr", "eval", "exec")
            literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            assert not (node.func.id == "getattr" and literal)
            assert not (below and node.func.id == "print")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            writes_text = node.func.attr == "write_text" or (node.func.attr == "open" and is_text_mode(node.args[:1]))
            keywords = {keyword.arg for keyword in node.keywords}
            assert not writes_text or "newline" in keywords, "a text has the same bytes on every system"
        if isinstance(node, ast.Attribute) and below:
            assert not (node.attr in ("environ", "getenv", "argv") and isinstance(node.value, ast.Name))
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__"
        if isinstance(node, ast.Import):
            assert not {"pickle", "shelve"} & {name.name for name in node.names}


def is_text_mode(arguments):
    """Whether a file is opened to write text."""
    mode = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else "r"
    return isinstance(mode, str) and bool(set("wax+") & set(mode)) and "b" not in mode


def test_long_public_functions_have_docstrings():
    public = [(path, node) for path, node in functions() if not node.name.startswith("_")]
    silent = [
        f"{path.name}:{node.name}" for path, node in public if not ast.get_docstring(node) and body_lines(node) > 12
    ]
    assert silent == []


def bound_names(tree):
    """Every name that is bound: variables, parameters, attributes, functions, classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name


def test_names_are_nouns_for_things():
    names = [name for _, tree in trees() for name in bound_names(tree)]
    assert len(names) > 10_000
    assert sum(name in VAGUE for name in names) / len(names) <= MAX_VAGUE_SHARE


def test_bound_names_are_counted_everywhere():
    source = """
def f(found, *said, told=1):
    for each in found: self.place = [made for made in each]
    try: given = (taken := 1)
    except E as there: pass
"""
    assert set(bound_names(ast.parse(source))) >= VAGUE


def test_source_fits_the_ledger():
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in FILES)
    assert lines <= MAX_SOURCE_LINES, f"{lines:,} lines"


def test_package_has_few_top_level_names():
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert len(names - {"__init__", "__main__"}) <= MAX_TOP_LEVEL_NAMES


def positional(node):
    """Parameters that a caller may pass by position, `self` and `cls` left out."""
    names = [parameter.arg for parameter in (*node.args.posonlyargs, *node.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_functions_take_three_positional_parameters_at_most():
    many = [
        f"{path.name}:{node.name}"
        for path, node in functions()
        if node.name not in FIXED_BY_CALLERS and path.name not in CALLED_BY_LIBRARIES
        if len(positional(node)) > MAX_POSITIONAL
    ]
    assert many == []
