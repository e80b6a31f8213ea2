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
from smolforge.data.sources.columns import column, fill_template
from smolforge.data.sources.text import read_text
from smolforge.data.sources.types import FileText, SourceRow, TokenIds
from smolforge.errors import InvalidFileError

__all__ = ["Document", "check_surrogates", "group_of", "python_docs", "read_text", "text_document"]


class Document(NamedTuple):
    group: str
    text: str
    location: str = ""
    """Where it is from, for a sentence about it."""
    ungrouped: bool = False
    """Whether nothing says what it should be kept together with."""
    ends: bool = True
    """Whether the document ends with this text; a large one comes in pieces."""
    starts: bool = True
    """Whether the document starts with this text."""
    ids: np.ndarray | None = None
    """Where it is tokenized already; then there is no text."""


def text_document(row: SourceRow, data: Data) -> Document:
    """A text, from whatever kind of file. Raises InvalidFileError, naming the place, where the row has none."""
    match row.record:
        case TokenIds(ids):
            return Document(row.name, "", row.location, ungrouped=True, ids=ids)
        case FileText():
            return Document(row.name, row.record, row.location, ends=row.ends)
    text = fill_template(data.text_template, row, "text_template") if data.text_template else text_of_row(row, data)
    return Document(
        group_of(row, data), check_surrogates(text, row.location), row.location, ungrouped=data.group_key is None
    )


def text_of_row(row: SourceRow, data: Data) -> str:
    """Return the value of text_key; a table's empty field is an empty text, and a list of texts is joined."""
    record, key = row.record, data.text_key
    is_mapping = isinstance(record, Mapping)
    value = column(row, key, "text_key") if is_mapping and key not in record and "." in key else None
    value = record.get(key) if is_mapping and key in record else value
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str | None) for item in value):
        return "\n".join(item for item in value if item)
    if is_mapping and value is None and key in record and ", row " in row.location:
        return ""
    raise InvalidFileError(
        f"{row.location} has no text under the key {key!r}; "
        f"{format_hint(record) or 'name the right one with --data.text-key'}{list_keys(record)}"
    )


def format_hint(record: Any) -> str:
    """Return a hint which data.format reads a row that has no text."""
    if not isinstance(record, Mapping):
        return ""
    if {"chosen", "rejected"} <= record.keys():
        return "it is a pair of answers, which --data.format pairs reads"
    is_conversation = "messages" in record or {"prompt", "completion"} <= record.keys()
    if "blob_id" in record:
        return "--data.text-url says where the text of its blob_id is"
    return "it is a conversation, which --data.format chat reads" if is_conversation else ""


def list_keys(record: Any) -> str:
    keys = [str(key) for key in record][:12] if isinstance(record, Mapping) else []
    return f" (there are {', '.join(keys)})" if len(keys) > 1 else ""


def group_of(row: SourceRow, data: Data) -> str:
    """What a row's document must not be separated from."""
    return row.name if data.group_key is None else str(column(row, data.group_key, "group_key"))


def check_surrogates(text: str, location: str) -> str:
    """Return the text, or raise InvalidFileError where JSON's escapes left half of a character in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidFileError(f"{location} has half of a surrogate pair, which is no character") from None
    return text


@functools.cache
def python_docs() -> tuple[Document, ...]:
    """The documentation that every CPython carries: the language reference's topics and all docstrings.

    A module is a document, a top-level package is a group; tests are left out. It differs a little
    between Python versions, so a result made with it names the version.
    """
    from pydoc_data import topics

    documents = [Document("pydoc_data", f"{name}\n\n{text.strip()}\n") for name, text in sorted(topics.topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(_modules(library)):
        text = "\n\n".join(_docstrings(path))
        if text:
            documents.append(Document(path.relative_to(library).with_suffix("").parts[0], text + "\n"))
    return tuple(documents)


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
