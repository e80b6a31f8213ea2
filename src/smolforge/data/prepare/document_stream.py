"""Parts of sources to documents, in order, each row once: a document, or why it is left out."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from smolforge.config import Data
from smolforge.data import sources
from smolforge.data.prepare.documents import Document, group_of, python_docs, whole
from smolforge.data.prepare.tokenize_documents import FORMS
from smolforge.data.sources import Part, Row, remote_text
from smolforge.data.sources.columns import tests
from smolforge.data.sources.text import characters, is_large
from smolforge.errors import InvalidFile

FILTERED, MISSING, TOO_SHORT, TOO_LONG = "filtered", "missing", "too_short", "too_long"
"""Why a row makes no document."""


def documents(source: str, data: Data) -> Iterator[Document]:
    """All documents of one source.

    Raises InvalidFile, naming file and line, for whatever is missing, binary or malformed.
    """
    for part in sources.parts(source, data):
        yield from (each for each in read(part, data) if isinstance(each, Document))


def read(part: Part, data: Data, skip: int = 0) -> Iterator[Document | str]:
    """What each row of a part after the first `skip` becomes."""
    if part.kind == sources.PYTHON_DOCS:
        found: Iterator[Document | str] = islice(python_docs(), skip, None)
    elif data.text_url is not None:
        found = fetched_documents(part, data, skip)
    else:
        conditions, make = tests(data), FORMS[data.format].document
        found = (
            make(row, data) if all(meets(row) for meets in conditions) else FILTERED
            for row in sources.rows(part, data, skip)
        )
    if is_large(part):
        return as_one(found, part, data, skip)
    return (within(each, data) if isinstance(each, Document) and each.ids is None else each for each in found)


def within(document: Document, data: Data) -> Document | str:
    """The document, unless it is too long or too short."""
    return misfit(len(document.text), data) or document


def as_one(pieces: Iterator[Document | str], part: Part, data: Data, skip: int) -> Iterator[Document | str]:
    """The pieces of a large text, of which none says how long all of it is; or, once, why it is left out."""
    limited = data.min_characters or data.max_characters is not None
    why = misfit(characters(Path(part.place)), data) if limited else None
    yield from pieces if why is None else [why][skip:]


def misfit(length: int, data: Data) -> str | None:
    """Why a text of so many characters is left out."""
    if length < data.min_characters:
        return TOO_SHORT
    return TOO_LONG if data.max_characters is not None and length > data.max_characters else None


def fetched_documents(part: Part, data: Data, skip: int) -> Iterator[Document | str]:
    """Documents whose text stands elsewhere."""
    conditions = tests(data)
    if data.format != "text":
        raise InvalidFile(f"data.text_url fetches texts, and data.format is {data.format}")

    def wanted(row: Row) -> bool:
        return all(meets(row) for meets in conditions)

    for row, text in remote_text.texts(sources.rows(part, data, skip), wanted, data):
        if isinstance(text, str):
            group = group_of(row, data)
            yield Document(group, whole(text, row.place), row.place, alone=data.group_key is None)
        else:
            yield MISSING if text is None else FILTERED
