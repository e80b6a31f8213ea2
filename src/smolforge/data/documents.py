"""Sources to documents: (group, text) pairs in a fixed order.

A group is what must never be cut by the held-out split, because its documents resemble each other: a
package of the standard library, a file, or whatever `group_key` says.
"""

import ast
import functools
import glob
import inspect
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smolforge.config import Data
from smolforge.errors import InvalidFile

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".raw", ".text")
JSON_SUFFIXES = (".jsonl", ".ndjson")


class Document(NamedTuple):
    group: str
    text: str
    place: str = ""
    """Where it is from, for a sentence about it; known of conversations."""


def documents(source: str, data: Data) -> Iterator[Document]:
    """All documents of one source.

    Raises InvalidFile, naming file and line, for whatever is missing, binary or malformed.
    """
    if source == PYTHON_DOCS:
        yield from python_docs()
        return
    for path in files(source):
        if path.suffix in JSON_SUFFIXES:
            yield from _json_lines(path, data)
        else:
            yield Document(path.name, read_text(path))


def files(source: str) -> list[Path]:
    """The files a source names: itself, those below a directory, or those a glob matches."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        known = TEXT_SUFFIXES + JSON_SUFFIXES
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in known)
        if not found:
            raise InvalidFile(f"there is no text in {source}: no file below it ends in {', '.join(known)}")
        return found
    found = sorted(
        Path(name)
        for name in glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if Path(name).is_file()
    )
    if not found:
        raise InvalidFile(f"there is no file, directory or match for the data source {source!r}")
    return found


def read_text(path: Path) -> str:
    """A whole UTF-8 file, its line ends kept as they are."""
    content = path.read_bytes()
    if b"\0" in content:
        raise InvalidFile(f"{path} is not text: it has a zero byte at {content.index(0)}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidFile(f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from None


def _json_lines(path: Path, data: Data) -> Iterator[Document]:
    for number, record in records(path):
        if not isinstance(record, dict) or not isinstance(record.get(data.text_key), str):
            talks = isinstance(record, dict) and ("messages" in record or {"prompt", "completion"} <= record.keys())
            way_out = "it is a conversation, which --data.format chat reads" if talks else ""
            if isinstance(record, dict) and {"chosen", "rejected"} <= record.keys():
                way_out = "it is a pair of answers, which --data.format pairs reads"
            raise InvalidFile(
                f"{path}, line {number} has no text under the key {data.text_key!r}; "
                f"{way_out or 'name the right one with --data.text-key'}"
            )
        yield Document(group_of(record, path, number, data), whole(record[data.text_key], path, number))


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not empty, from 1, and what its JSON says."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidFile(f"{path}, line {number} is not JSON: {error}") from None


def group_of(record: dict[str, Any], path: Path, number: int, data: Data) -> str:
    """What a line's document must not be separated from."""
    if data.group_key is None:
        return f"{path.name}:{number}"
    if data.group_key not in record:
        raise InvalidFile(f"{path}, line {number} has no key {data.group_key!r} (data.group_key)")
    return str(record[data.group_key])


def whole(text: str, path: Path, number: int) -> str:
    """The text, unless JSON's escapes left half of a character in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidFile(f"{path}, line {number} has half of a surrogate pair, which is no character") from None
    return text


@functools.cache
def python_docs() -> tuple[Document, ...]:
    """The documentation that every CPython carries: the language reference's topics and all docstrings.

    A module is a document, a top-level package is a group; tests are left out. It differs a little
    between Python versions, so a result made with it names the version.
    """
    from pydoc_data import topics

    found = [Document("pydoc_data", f"{name}\n\n{text.strip()}\n") for name, text in sorted(topics.topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(_modules(library)):
        text = "\n\n".join(_docstrings(path))
        if text:
            found.append(Document(path.relative_to(library).with_suffix("").parts[0], text + "\n"))
    return tuple(found)


def _modules(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in ("site-packages", "pydoc_data", "test", "tests", "idle_test") or path.name.startswith("test_"):
            continue
        if path.is_dir():
            yield from _modules(path)
        elif path.suffix == ".py":
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in the order of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's docstrings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            return
    for node in _in_order(tree):
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            yield inspect.cleandoc(text).strip()


def _in_order(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # no docstring in an expression
            yield from _in_order(child)
