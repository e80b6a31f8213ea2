"""Plan the jobs of a corpus, in the order of the sources, and train the tokenizer where none is given.

sources -> parts -> (documents -> a tokenizer, where none is given) -> jobs, one for each part
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.config import Data
from smolforge.data.corpus import TRAIN
from smolforge.data.prepare.dedup import band_function
from smolforge.data.prepare.document_stream import read_part
from smolforge.data.prepare.documents import Document
from smolforge.data.prepare.jobs import PrepareJob, tokenizer_digest
from smolforge.data.prepare.split import SourcePlan, plan_sources, text_digest
from smolforge.data.prepare.token_budget import TokenBudget
from smolforge.data.prepare.tokenize_documents import DATA_FORMATS
from smolforge.data.sources.datatrove_tokens import check_tokenizer
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.chat_encoding import chat_tokenizer

MAX_TRAINING_CHARACTERS = 256 << 20
"""Characters that a tokenizer is trained on, of a source that is not counted."""


def tokenizer_for_format(data: Data, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """Return the tokenizer with what data.format needs of it, or None where there is none yet."""
    return chat_tokenizer(tokenizer) if tokenizer is not None and data.format != "text" else tokenizer


def plan_jobs(
    work: Path,
    request: dict[str, Any],
    data: Data,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_tokens: int | None,
) -> tuple[list[PrepareJob], Tokenizer]:
    """Return the jobs in the order of the sources, and the tokenizer, which is saved in the work folder.

    A tokenizer that was trained is not trained again.
    """
    band_function(data, tokenizer)  # raises before hours are spent
    planned = plan_sources(data)
    request_file, request_json = work / "request.json", json.dumps(request)
    if request_file.is_file() and request_file.read_text("utf-8") == request_json:
        tokenizer = tokenizer or Tokenizer.load(work / "tokenizer")
    else:
        request_file.unlink(missing_ok=True)
        tokenizer = tokenizer or tokenizer_for_format(data, Tokenizer.train(training_texts(planned, data), vocab_size))
        assert tokenizer is not None
        shutil.rmtree(work / "tokenizer", ignore_errors=True)
        atomic.write_dir_atomic(work / "tokenizer", tokenizer.save)
        atomic.write_text_atomic(request_file, request_json)
    return jobs_of(planned, data, tokenizer, max_tokens=max_tokens, work=work), tokenizer


def training_texts(planned: Sequence[SourcePlan], data: Data) -> Iterator[str]:
    """Yield the training split of all sources, each document once; of a large source its start."""
    seen: set[bytes] = set()
    for source_plan in planned:
        num_characters = 0
        for document, start in documents_with_offsets(source_plan, data):
            if not source_plan.plan.counted and num_characters > MAX_TRAINING_CHARACTERS:
                break
            num_characters += len(document.text)
            key = text_digest(document.text)
            if (key in seen and document.ends) or not document.text.strip():
                continue
            seen.add(key)
            pieces = source_plan.plan.pieces(document, start)
            yield from (DATA_FORMATS[data.format].training_text(piece) for split, piece in pieces if split == TRAIN)


def documents_with_offsets(planned: SourcePlan, data: Data) -> Iterator[tuple[Document, int]]:
    """Yield all documents of a source, with the number of characters before each."""
    start = 0
    for part in planned.parts:
        if part.kind == "tokens":
            check_tokenizer(Path(part.location), None)
        for document in read_part(part, data):
            if isinstance(document, Document):
                yield document, start
                start += len(document.text)


def jobs_of(
    planned: Sequence[SourcePlan], data: Data, tokenizer: Tokenizer, *, max_tokens: int | None, work: Path
) -> list[PrepareJob]:
    """Return a job for each part. The limit is exact for each split where all shares are; else for both together."""
    budget = TokenBudget(max_tokens, data.held_out, shared=not all(source_plan.plan.counted for source_plan in planned))
    jobs = []
    for source_plan in planned:
        for part, before in zip(source_plan.parts, source_plan.characters_before, strict=True):
            if part.kind == "tokens":
                check_tokenizer(Path(part.location), tokenizer)
            jobs.append(PrepareJob(part, data, source_plan.plan, before, budget, tokenizer_digest(tokenizer), work))
    return jobs
