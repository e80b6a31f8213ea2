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
from smolforge.data.prepare.chunks import facts_of, rows_of
from smolforge.data.prepare.dedup import tokens_of
from smolforge.data.prepare.jobs import Task
from smolforge.data.prepare.merge import ShardWriter, assemble
from smolforge.data.prepare.plan import for_format, planned_tasks
from smolforge.data.prepare.split import after_choice
from smolforge.data.prepare.token_budget import Rooms
from smolforge.data.prepare.workers import do_all
from smolforge.errors import InvalidFile, SettingError
from smolforge.tokenizer import END_OF_TEXT, Tokenizer
from smolforge.tokenizer.chat import CHATML

__all__ = ["ShardWriter", "clear", "for_format", "prepare", "request_of", "work_folder"]

LATER = (
    *("text_template", "text_url", "encoding_key", "split", "filters", "min_characters", "max_characters"),
    "deduplication",
)
"""Settings that a corpus of before does not know: at their defaults they are as if they were not there."""
NOTHING = {
    "text": "nothing but white space",
    "chat": "no conversation in which an assistant answers",
    "pairs": "no pair of answers",
}
"""What sources hold of which no corpus can be made."""

Report = Callable[[dict[str, int]], None]


def prepare(
    data: Data,
    folder: Path,
    tokenizer: Tokenizer | None,
    vocab_size: int = 4096,
    max_tokens: int | None = None,
    report: Report = lambda _: None,
    workers: int = 1,
) -> Corpus:
    """Make the corpus of `data` in `folder`, or return the one already there if it is the same.

    Without a tokenizer one of `vocab_size` is trained on the training part. `max_tokens` is an upper
    limit of both parts together, each in its share. `report` is told documents, tokens and bytes so far, and
    of_tokens or of_bytes in all where they are known. However many `workers` there are, what comes of it is the
    same; for more than one, which are processes, a script needs the usual guard (`if __name__ == "__main__"`).

    Raises InvalidFile for sources that cannot be read, SettingError where `folder` holds something else,
    MissingResource when the disk is full or the Hub does not answer: the same call goes on from there.
    """
    tokenizer = for_format(data, tokenizer)
    request = request_of(data, tokenizer, vocab_size, max_tokens)
    if (corpus := already(folder, request)) is not None:
        shutil.rmtree(work_folder(folder), ignore_errors=True)  # of one that was killed when all was done
        return corpus
    with begun(folder) as work:
        if already(folder, request) is None:  # another process may have made it since
            todo, tokenizer = planned_tasks(work, request, data, tokenizer, vocab_size, max_tokens)
            done = do_all(todo, enough_of(todo), Reporter(todo, max_tokens, report), workers)
            check_found(done, todo, data)
            check_unchanged(request, todo)
            finish(folder, request, done, data, tokenizer)
        shutil.rmtree(work, ignore_errors=True)
    return Corpus.open(folder)


@contextmanager
def begun(folder: Path) -> Iterator[Path]:
    """Where the work on a corpus is done, by this process alone; nothing is left of it where nothing was done."""
    work = work_folder(folder)
    try:
        atomic.make_folder(work)
    except (NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise SettingError(f"{folder} cannot be made ({error.strerror}); give another folder") from None
    except OSError as error:
        raise atomic.unwritten(work, error, 0) from error
    with jobs.locked(work):
        try:
            yield work
        except (InvalidFile, SettingError):
            discard_empty(work)
            raise


def already(folder: Path, request: dict[str, Any]) -> Corpus | None:
    """The corpus that is there. Raises SettingError where something else is."""
    if (folder / "corpus.json").is_file():
        corpus = Corpus.open(folder)
        if corpus.facts["request"] == request:
            return corpus
        raise SettingError(
            f"{folder} holds a corpus made with other settings, or from files that changed since; "
            "give another folder, or delete it"
        )
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise SettingError(f"{folder} exists and is not a corpus; give another folder")
    return None


def clear(
    folder: Path, data: Data, tokenizer: Tokenizer | None, vocab_size: int, max_tokens: int | None = None
) -> None:
    """Delete what `prepare` would find in the way, and nothing it would return."""
    if not folder.exists():
        return
    wanted = request_of(data, for_format(data, tokenizer), vocab_size, max_tokens)
    try:
        same = Corpus.open(folder).facts["request"] == wanted
    except InvalidFile:
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


def request_of(data: Data, tokenizer: Tokenizer | None, vocab_size: int, max_tokens: int | None) -> dict[str, Any]:
    """All that decides what is in a corpus."""
    made_by = tokenizer.fingerprint if tokenizer else f"trained, {vocab_size} ids"
    settings = data.model_dump(mode="json", exclude=set(jobs.OF_READING))
    unset = Data().model_dump(mode="json", include=set(LATER)).items()
    asked = {
        "data": {key: value for key, value in settings.items() if (key, value) not in unset},
        "tokenizer": made_by,
        "max_tokens": max_tokens,
        "files": {source: sources.stamp(source) for source in data.sources},
    }
    if data.format == "text" and tokenizer is not None and tokenizer.eos_token != END_OF_TEXT:
        asked["end_of_text"] = tokenizer.eos_token
    if data.format != "text":
        template = tokenizer.template.source if tokenizer and tokenizer.template else CHATML
        asked["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
        asked |= {} if max_tokens is None else {"ends": "with the first that does not fit"}  # once it did not
    return asked


def chunks_of(done: Sequence[Task]) -> list[Path]:
    return [chunk for task in done for chunk in jobs.chunks(task)]


def enough_of(todo: Sequence[Task]) -> Callable[[Sequence[Task]], bool]:
    """Whether the first tasks fill all the room there is."""
    rooms = todo[0].rooms if todo else Rooms()
    found = rooms.copy()

    def enough(done: Sequence[Task]) -> bool:
        if rooms.limits[0] is None:
            return False
        for split, tokens in tokens_of(chunks_of(done[-1:]), rooms).taken.items():
            found.take(split, tokens)
        return found.full and tokens_of(chunks_of(done), rooms).full  # some may be in several of them

    return enough


class Reporter:
    """Adds up what the tasks tell, and says how much there is in all where that is known."""

    def __init__(self, todo: Sequence[Task], max_tokens: int | None, report: Report) -> None:
        self.report = report
        self.so_far: Counter[str] = Counter(documents=0, tokens=0, bytes=0)
        for chunk in chunks_of(todo):
            rows = rows_of(chunk)
            sums = {"tokens": int(rows["length"].sum()), "bytes": int(rows["text_bytes"].sum())}
            self.so_far.update(documents=int(rows["first"].sum()), **sums)
        sizes = [task.part.size for task in todo]
        whole = sum(size or 0 for size in sizes)
        self.whole = {"of_tokens": max_tokens} if max_tokens is not None else {}
        self.whole |= {"of_bytes": whole} if whole and None not in sizes else {}
        if self.so_far["tokens"]:
            self({})

    def __call__(self, more: dict[str, int]) -> None:
        self.so_far.update(more)
        self.report(dict(self.so_far) | self.whole)


def check_found(done: Sequence[Task], todo: Sequence[Task], data: Data) -> None:
    """Raises InvalidFile where a source was read to its end, and had nothing."""
    for source in data.sources:
        its = [task for task in todo if task.part.source == source]
        read_all = all(task in done for task in its)
        if read_all and not any(facts_of(chunk)["rows"] for chunk in chunks_of(its)):
            raise InvalidFile(f"the data source {source!r} is empty{after_choice(data)}")


def check_unchanged(request: dict[str, Any], todo: Sequence[Task]) -> None:
    """Raises InvalidFile where a source became another while it was read: what was made of it is a mixture."""
    for source, before in request["files"].items():
        streamed = [task.part.place for task in todo if task.part.kind == "hub" and task.part.source == source]
        if before != (streamed[:1] or sources.stamp(source)):
            raise InvalidFile(f"the data source {source!r} changed while it was read; run the same command again")


def finish(folder: Path, request: dict[str, Any], done: Sequence[Task], data: Data, tokenizer: Tokenizer) -> None:
    """Write the corpus, which appears as a whole."""
    described: dict[str, Any] = {"format_version": FORMAT_VERSION, "request": request}
    if sources.PYTHON_DOCS in data.sources:
        described["python"] = platform.python_version()

    def fill(temporary: Path) -> None:
        tokenizer.save(temporary / "tokenizer")
        names = [task.part.source for task in done for _ in jobs.chunks(task)]
        facts, dropped = assemble(temporary, chunks_of(done), tokenizer, data.format, done[0].rooms, names)
        if not any(facts["splits"][split]["tokens"] for split in SPLITS):
            raise nothing_found(done, data, dropped, request["max_tokens"])
        facts["dropped"] = dict(dropped)
        (temporary / "corpus.json").write_text(json.dumps(described | facts, indent=2) + "\n", "utf-8")

    if folder.exists():
        folder.rmdir()
    atomic.write_whole(folder, fill)


def nothing_found(done: Sequence[Task], data: Data, dropped: Counter[str], max_tokens: int | None) -> Exception:
    """Why there is no token in the corpus."""
    if max_tokens is not None and any(len(jobs.rows_of(chunk)) for chunk in chunks_of(done)):
        return SettingError(
            f"{max_tokens:,} is too low a limit of tokens for a document and its end; give a higher one"
        )
    return InvalidFile(f"the data sources hold {NOTHING[data.format]}{left_out(dropped)}")


def left_out(dropped: Counter[str]) -> str:
    """What became of the rows there were."""
    said = [f"{count:,} {why.replace('_', ' ')}" for why, count in dropped.items() if count]
    return f" (left out: {', '.join(said)})" if said else ""
