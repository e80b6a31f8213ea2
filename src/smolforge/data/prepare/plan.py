"""What there is to do for a corpus, as tasks in the order of the sources, and the tokenizer to do it with.

sources -> parts -> (documents -> a tokenizer, where none is given) -> tasks, each for one part
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.config import Data
from smolforge.data.corpus import TRAIN
from smolforge.data.prepare.dedup import comparison
from smolforge.data.prepare.document_stream import read
from smolforge.data.prepare.documents import Document
from smolforge.data.prepare.jobs import Task, identity
from smolforge.data.prepare.split import Planned, digest, surveys
from smolforge.data.prepare.token_budget import Rooms
from smolforge.data.prepare.tokenize_documents import FORMS
from smolforge.data.sources.datatrove_tokens import check_tokenizer
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.chat_encoding import chat_tokenizer

MOST_TRAINED_ON = 256 << 20
"""Characters that a tokenizer is trained on, of a source that is not counted."""


def for_format(data: Data, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer with what a format needs of it, if there is one yet."""
    return chat_tokenizer(tokenizer) if tokenizer is not None and data.format != "text" else tokenizer


def planned_tasks(
    work: Path,
    request: dict[str, Any],
    data: Data,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_tokens: int | None,
) -> tuple[list[Task], Tokenizer]:
    """What there is to do, in the order of the sources, and the tokenizer to do it with, which lies among the tasks.

    One that was trained is not trained again.
    """
    comparison(data, tokenizer)  # raises before hours are spent
    planned = surveys(data)
    said, asked = work / "request.json", json.dumps(request)
    if said.is_file() and said.read_text("utf-8") == asked:
        tokenizer = tokenizer or Tokenizer.load(work / "tokenizer")
    else:
        said.unlink(missing_ok=True)
        tokenizer = tokenizer or for_format(data, Tokenizer.train(words(planned, data), vocab_size))
        assert tokenizer is not None
        shutil.rmtree(work / "tokenizer", ignore_errors=True)
        atomic.write_whole(work / "tokenizer", tokenizer.save)
        atomic.replace(said, asked)
    return tasks_of(planned, data, tokenizer, max_tokens, work), tokenizer


def words(planned: Sequence[Planned], data: Data) -> Iterator[str]:
    """The training part of all sources, each document once; of a large one its beginning."""
    seen: set[bytes] = set()
    for each in planned:
        held = 0
        for document, start in numbered(each, data):
            if not each.plan.counted and held > MOST_TRAINED_ON:
                break
            held += len(document.text)
            found = digest(document.text)
            if (found in seen and document.ends) or not document.text.strip():
                continue
            seen.add(found)
            pieces = each.plan.pieces(document, start)
            yield from (FORMS[data.format].words(piece) for split, piece in pieces if split == TRAIN)


def numbered(planned: Planned, data: Data) -> Iterator[tuple[Document, int]]:
    """All documents of a source, with the number of characters before each."""
    start = 0
    for part in planned.parts:
        if part.kind == "tokens":
            check_tokenizer(Path(part.place), None)
        for document in read(part, data):
            if isinstance(document, Document):
                yield document, start
                start += len(document.text)


def tasks_of(
    planned: Sequence[Planned], data: Data, tokenizer: Tokenizer, max_tokens: int | None, work: Path
) -> list[Task]:
    """A task for each part. A limit is exact for each split where all shares are, and else for both together."""
    rooms = Rooms(max_tokens, data.held_out, together=not all(each.plan.counted for each in planned))
    found = []
    for each in planned:
        for part, before in zip(each.parts, each.before, strict=True):
            if part.kind == "tokens":
                check_tokenizer(Path(part.place), tokenizer)
            found.append(Task(part, data, each.plan, before, rooms, identity(tokenizer), work))
    return found
