"""Documents to token shards on disk.

    sources -> parts -> rows -> documents -> (hold out) -> token ids, in chunks, by as many processes as one likes
    chunks -> (what was there before, or what is near it: left out) -> DIR/{train,held_out}/00000.ds

Conversations take the same way; of them only some ids are learned, which `.ds.loss` says. A corpus is whole or is not
there; what is done of one that is not stands beside it in .preparing-DIR, where the same command goes on.
"""

import hashlib
import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.config import Data
from smolforge.data import sources
from smolforge.data.corpus import FORMAT_VERSION, SPLITS, Corpus
from smolforge.data.prepare import jobs
from smolforge.data.prepare.chunks import load_metadata, load_rows
from smolforge.data.prepare.dedup import spent_budget
from smolforge.data.prepare.jobs import PrepareJob, ProgressCallback
from smolforge.data.prepare.merge import ShardWriter, assemble
from smolforge.data.prepare.plan import plan_jobs, tokenizer_for_format
from smolforge.data.prepare.split import filters_hint
from smolforge.data.prepare.token_budget import TokenBudget
from smolforge.data.prepare.workers import run_jobs
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.tokenizer import END_OF_TEXT, Tokenizer
from smolforge.tokenizer.chat import CHATML

__all__ = ["ShardWriter", "prepare", "remove_outdated", "request_of", "tokenizer_for_format", "work_folder"]

ADDED_SETTINGS = (
    *("text_template", "text_url", "encoding_key", "split", "filters", "min_characters", "max_characters"),
    "deduplication",
)
"""Settings that older corpora do not record: at their defaults they are left out of the request."""
NO_DOCUMENTS = {
    "text": "nothing but white space",
    "chat": "no conversation in which an assistant answers",
    "pairs": "no pair of answers",
}
"""What the sources hold when no corpus can be made of them, by data.format."""


def prepare(
    data: Data,
    folder: Path,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int = 4096,
    max_tokens: int | None = None,
    report: ProgressCallback = lambda _: None,
    workers: int = 1,
) -> Corpus:
    """Make the corpus of `data` in `folder`, or return the one already there if it is the same.

    Without a tokenizer one of `vocab_size` is trained on the training part. `max_tokens` is an upper
    limit of both parts together, each in its share. `report` is called with documents, tokens and bytes so far,
    and with the totals of_tokens or of_bytes where they are known. However many `workers` there are, what comes of it
    is the same; for more than one, which are processes, a script needs the usual guard (`if __name__ == "__main__"`).

    Raises InvalidFileError for sources that cannot be read, ConfigError where `folder` holds something else,
    MissingResourceError when the disk is full or the Hub does not answer: the same call goes on from there.
    """
    tokenizer = tokenizer_for_format(data, tokenizer)
    request = request_of(data, tokenizer, vocab_size, max_tokens=max_tokens)
    if (corpus := existing_corpus(folder, request)) is not None:
        shutil.rmtree(work_folder(folder), ignore_errors=True)  # of one that was killed when all was done
        return corpus
    with open_work_folder(folder) as work:
        if existing_corpus(folder, request) is None:  # another process may have made it since
            todo, tokenizer = plan_jobs(
                work, request, data, tokenizer=tokenizer, vocab_size=vocab_size, max_tokens=max_tokens
            )
            finished = run_jobs(todo, stop_condition(todo), ProgressReporter(todo, max_tokens, report), workers=workers)
            check_not_empty(finished, todo, data)
            check_unchanged(request, todo)
            write_corpus(folder, request, finished, data=data, tokenizer=tokenizer)
        shutil.rmtree(work, ignore_errors=True)
    return Corpus.open(folder)


@contextmanager
def open_work_folder(folder: Path) -> Iterator[Path]:
    """Lock the folder in which this process alone prepares a corpus; remove it again if nothing was done."""
    work = work_folder(folder)
    try:
        atomic.make_dir_durable(work)
    except (NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); give another folder") from None
    except OSError as error:
        raise atomic.write_error(work, error, 0) from error
    with jobs.lock_folder(work):
        try:
            yield work
        except (InvalidFileError, ConfigError):
            discard_empty(work)
            raise


def existing_corpus(folder: Path, request: dict[str, Any]) -> Corpus | None:
    """Return the corpus that exists already. Raises ConfigError where something else does."""
    if (folder / "corpus.json").is_file():
        corpus = Corpus.open(folder)
        if corpus.metadata["request"] == request:
            return corpus
        raise ConfigError(
            f"{folder} holds a corpus made with other settings, or from files that changed since; "
            "give another folder, or delete it"
        )
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(f"{folder} exists and is not a corpus; give another folder")
    return None


def remove_outdated(
    folder: Path, data: Data, tokenizer: Tokenizer | None, *, vocab_size: int, max_tokens: int | None = None
) -> None:
    """Delete the folder, unless it has the corpus that `prepare` would return."""
    if not folder.exists():
        return
    request = request_of(data, tokenizer_for_format(data, tokenizer), vocab_size, max_tokens=max_tokens)
    try:
        same = Corpus.open(folder).metadata["request"] == request
    except InvalidFileError:
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)


def work_folder(folder: Path) -> Path:
    """Where what is done of a corpus waits for the rest."""
    return folder.with_name(f".preparing-{folder.name}")


def discard_empty(work: Path) -> None:
    """Leave nothing behind where nothing is done."""
    if not any(ids.stat().st_size for ids in work.glob("*/[0-9]*/ids")):
        shutil.rmtree(work, ignore_errors=True)


def request_of(data: Data, tokenizer: Tokenizer | None, vocab_size: int, *, max_tokens: int | None) -> dict[str, Any]:
    """All that decides what is in a corpus."""
    tokenizer_id = tokenizer.fingerprint if tokenizer else f"trained, {vocab_size} ids"
    settings = data.model_dump(mode="json", exclude=set(jobs.READ_SETTINGS))
    unset = Data().model_dump(mode="json", include=set(ADDED_SETTINGS)).items()
    request = {
        "data": {key: value for key, value in settings.items() if (key, value) not in unset},
        "tokenizer": tokenizer_id,
        "max_tokens": max_tokens,
        "files": {source: sources.stamp(source) for source in data.sources},
    }
    if data.format == "text" and tokenizer is not None and tokenizer.eos_token != END_OF_TEXT:
        request["end_of_text"] = tokenizer.eos_token
    if data.format == "text" and tokenizer is not None and tokenizer.bos_ids:
        request["bos"] = "before every document"  # once it was not
    if data.format != "text":
        template = tokenizer.template.source if tokenizer and tokenizer.template else CHATML
        request["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
        request |= {} if max_tokens is None else {"ends": "with the first that does not fit"}  # once it did not
    return request


def chunks_of(finished: Sequence[PrepareJob]) -> list[Path]:
    return [chunk for job in finished for chunk in jobs.finished_chunks(job)]


def stop_condition(todo: Sequence[PrepareJob]) -> Callable[[Sequence[PrepareJob]], bool]:
    """Return a test of whether the first jobs use up the token budget."""
    budget = todo[0].budget if todo else TokenBudget()
    spent = budget.copy()

    def is_enough(finished: Sequence[PrepareJob]) -> bool:
        if budget.limits[0] is None:
            return False
        for split, tokens in spent_budget(chunks_of(finished[-1:]), budget).used.items():
            spent.take(split, tokens)
        return spent.exhausted and spent_budget(chunks_of(finished), budget).exhausted  # some may be in several of them

    return is_enough


class ProgressReporter:
    """Adds up what the jobs report, and adds the total where it is known."""

    def __init__(self, todo: Sequence[PrepareJob], max_tokens: int | None, report: ProgressCallback) -> None:
        self.report = report
        self.so_far: Counter[str] = Counter(documents=0, tokens=0, bytes=0)
        for chunk in chunks_of(todo):
            rows = load_rows(chunk)
            sums = {"tokens": int(rows["length"].sum()), "bytes": int(rows["text_bytes"].sum())}
            self.so_far.update(documents=int(rows["first"].sum()), **sums)
        sizes = [job.part.size for job in todo]
        total_bytes = sum(size or 0 for size in sizes)
        self.totals = {"of_tokens": max_tokens} if max_tokens is not None else {}
        self.totals |= {"of_bytes": total_bytes} if total_bytes and None not in sizes else {}
        if self.so_far["tokens"]:
            self({})

    def __call__(self, increments: dict[str, int]) -> None:
        self.so_far.update(increments)
        self.report(dict(self.so_far) | self.totals)


def check_not_empty(finished: Sequence[PrepareJob], todo: Sequence[PrepareJob], data: Data) -> None:
    """Raise InvalidFileError where a source was read to its end and had no documents."""
    for source in data.sources:
        source_jobs = [job for job in todo if job.part.source == source]
        read_all = all(job in finished for job in source_jobs)
        if read_all and not any(load_metadata(chunk)["rows"] for chunk in chunks_of(source_jobs)):
            raise InvalidFileError(f"the data source {source!r} is empty{filters_hint(data)}")


def check_unchanged(request: dict[str, Any], todo: Sequence[PrepareJob]) -> None:
    """Raises InvalidFileError where a source became another while it was read: what was made of it is a mixture."""
    for source, before in request["files"].items():
        streamed = [job.part.location for job in todo if job.part.kind == "hub" and job.part.source == source]
        if before != (streamed[:1] or sources.stamp(source)):
            raise InvalidFileError(f"the data source {source!r} changed while it was read; run the same command again")


def write_corpus(
    folder: Path, request: dict[str, Any], finished: Sequence[PrepareJob], *, data: Data, tokenizer: Tokenizer
) -> None:
    """Write the corpus, atomically."""
    header: dict[str, Any] = {"format_version": FORMAT_VERSION, "request": request}
    if sources.PYTHON_DOCS in data.sources:
        header["python"] = platform.python_version()

    def fill(temporary: Path) -> None:
        tokenizer.save(temporary / "tokenizer")
        names = [job.part.source for job in finished for _ in jobs.finished_chunks(job)]
        metadata, dropped = assemble(
            temporary, chunks_of(finished), tokenizer, format_name=data.format, budget=finished[0].budget, sources=names
        )
        if not any(metadata["splits"][split]["tokens"] for split in SPLITS):
            raise no_tokens_error(finished, data, dropped, max_tokens=request["max_tokens"])
        metadata["dropped"] = dict(dropped)
        (temporary / "corpus.json").write_text(json.dumps(header | metadata, indent=2) + "\n", "utf-8", newline="\n")

    if folder.exists():
        folder.rmdir()
    atomic.write_dir_atomic(folder, fill)


def no_tokens_error(
    finished: Sequence[PrepareJob], data: Data, dropped: Counter[str], *, max_tokens: int | None
) -> Exception:
    """Return the error that says why the corpus has no tokens."""
    if max_tokens is not None and any(len(jobs.load_rows(chunk)) for chunk in chunks_of(finished)):
        return ConfigError(f"{max_tokens:,} is too low a limit of tokens for a document and its end; give a higher one")
    return InvalidFileError(f"the data sources hold {NO_DOCUMENTS[data.format]}{describe_dropped(dropped)}")


def describe_dropped(dropped: Counter[str]) -> str:
    """List why rows were dropped."""
    parts = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count]
    return f" (left out: {', '.join(parts)})" if parts else ""
