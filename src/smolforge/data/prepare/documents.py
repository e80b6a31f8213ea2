"""Rows to documents: their text, and the group they are in.

A group is what must never be cut by the held-out split, because its documents resemble each other: a
package of the standard library, a file, or whatever `group_key` says.
"""

import ast
import functools
import inspect
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smolforge.config import Data
from smolforge.data.sources.columns import column, filled
from smolforge.data.sources.text import read_text
from smolforge.data.sources.types import Ids, Row, Text
from smolforge.errors import InvalidFile

__all__ = ["Document", "group_of", "python_docs", "read_text", "text_document", "whole"]


class Document(NamedTuple):
    group: str
    text: str
    place: str = ""
    """Where it is from, for a sentence about it."""
    alone: bool = False
    """Whether nothing says what it should be kept together with."""
    ends: bool = True
    """Whether the document ends with this text; a large one comes in pieces."""
    ids: np.ndarray | None = None
    """Where it is tokenised already; then there is no text."""


def text_document(row: Row, data: Data) -> Document:
    """A text, from whatever kind of file. Raises InvalidFile, naming the place, where the row has none."""
    match row.record:
        case Ids(ids):
            return Document(row.name, "", row.place, alone=True, ids=ids)
        case Text():
            return Document(row.name, row.record, row.place, ends=row.ends)
    text = filled(data.text_template, row, "text_template") if data.text_template else text_of(row, data)
    return Document(group_of(row, data), whole(text, row.place), row.place, alone=data.group_key is None)


def text_of(row: Row, data: Data) -> str:
    """What stands under text_key; a table's empty field is an empty text, and of a list all texts are joined."""
    record, key = row.record, data.text_key
    there = isinstance(record, Mapping)
    value = column(row, key, "text_key") if there and key not in record and "." in key else None
    value = record.get(key) if there and key in record else value
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str | None) for each in value):
        return "\n".join(each for each in value if each)
    if there and value is None and key in record and ", row " in row.place:
        return ""
    raise InvalidFile(
        f"{row.place} has no text under the key {key!r}; "
        f"{way_out(record) or 'name the right one with --data.text-key'}{known(record)}"
    )


def way_out(record: Any) -> str:
    """Which format reads a row that has no text."""
    if not isinstance(record, Mapping):
        return ""
    if {"chosen", "rejected"} <= record.keys():
        return "it is a pair of answers, which --data.format pairs reads"
    talks = "messages" in record or {"prompt", "completion"} <= record.keys()
    if "blob_id" in record:
        return "--data.text-url says where the text of its blob_id is"
    return "it is a conversation, which --data.format chat reads" if talks else ""


def known(record: Any) -> str:
    keys = [str(key) for key in record][:12] if isinstance(record, Mapping) else []
    return f" (there are {', '.join(keys)})" if len(keys) > 1 else ""


def group_of(row: Row, data: Data) -> str:
    """What a row's document must not be separated from."""
    return row.name if data.group_key is None else str(column(row, data.group_key, "group_key"))


def whole(text: str, place: str) -> str:
    """The text, unless JSON's escapes left half of a character in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidFile(f"{place} has half of a surrogate pair, which is no character") from None
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
