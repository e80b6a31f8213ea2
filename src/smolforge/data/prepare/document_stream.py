"""Parts of sources to documents, in order, each row once: a document, or why it is left out."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from smolforge.config import Data
from smolforge.data import sources
from smolforge.data.prepare.documents import Document, check_surrogates, group_of, python_docs
from smolforge.data.prepare.tokenize_documents import DATA_FORMATS
from smolforge.data.sources import SourcePart, SourceRow, remote_text
from smolforge.data.sources.columns import row_filters
from smolforge.data.sources.text import count_characters, is_large
from smolforge.errors import InvalidFileError

FILTERED, MISSING, TOO_SHORT, TOO_LONG = "filtered", "missing", "too_short", "too_long"
"""Why a row makes no document."""


def documents(source: str, data: Data) -> Iterator[Document]:
    """All documents of one source.

    Raises InvalidFileError, naming file and line, for whatever is missing, binary or malformed.
    """
    for part in sources.parts(source, data):
        yield from (document for document in read_part(part, data) if isinstance(document, Document))


def read_part(part: SourcePart, data: Data, skip: int = 0) -> Iterator[Document | str]:
    """Yield for each row of a part, after the first `skip`, a document or why it is dropped."""
    if part.kind == sources.PYTHON_DOCS:
        results: Iterator[Document | str] = islice(python_docs(), skip, None)
    elif data.text_url is not None:
        results = remote_documents(part, data, skip)
    else:
        conditions, make = row_filters(data), DATA_FORMATS[data.format].parse
        results = (
            make(row, data) if all(meets(row) for meets in conditions) else FILTERED
            for row in sources.rows(part, data, skip)
        )
    if is_large(part):
        return filter_pieces_by_length(results, part, data, skip=skip)
    return (
        filter_by_length(result, data) if isinstance(result, Document) and result.ids is None else result
        for result in results
    )


def filter_by_length(document: Document, data: Data) -> Document | str:
    """Return the document, or why it is dropped if it is too long or too short."""
    return length_drop_reason(len(document.text), data) or document


def filter_pieces_by_length(
    pieces: Iterator[Document | str], part: SourcePart, data: Data, *, skip: int
) -> Iterator[Document | str]:
    """Yield the pieces of a large text, none of which knows the total length; or, once, why it is dropped."""
    limited = data.min_characters or data.max_characters is not None
    reason = length_drop_reason(count_characters(Path(part.location)), data) if limited else None
    yield from pieces if reason is None else [reason][skip:]


def length_drop_reason(length: int, data: Data) -> str | None:
    """Return why a text of `length` characters is dropped, or None."""
    if length < data.min_characters:
        return TOO_SHORT
    return TOO_LONG if data.max_characters is not None and length > data.max_characters else None


def remote_documents(part: SourcePart, data: Data, skip: int) -> Iterator[Document | str]:
    """Yield documents whose text is fetched from data.text_url."""
    conditions = row_filters(data)
    if data.format != "text":
        raise InvalidFileError(f"data.text_url fetches texts, and data.format is {data.format}")

    def is_wanted(row: SourceRow) -> bool:
        return all(meets(row) for meets in conditions)

    for row, text in remote_text.texts(sources.rows(part, data, skip), is_wanted, data):
        if isinstance(text, str):
            group = group_of(row, data)
            yield Document(group, check_surrogates(text, row.location), row.location, ungrouped=data.group_key is None)
        else:
            yield MISSING if text is None else FILTERED
