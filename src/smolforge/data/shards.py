"""Documents to token shards on disk.

    sources -> documents -> (drop duplicates, hold out) -> token ids -> DIR/{train,held_out}/00000.ds

Conversations take the same way; of them only some ids are learned, which `.ds.loss` says. A corpus is whole or is not
there.
"""

import hashlib
import itertools
import json
import logging
import math
import platform
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smolforge import commit
from smolforge.chat import CHATML
from smolforge.config import Data
from smolforge.data.corpus import FORMAT_VERSION, HELD_OUT, SPLITS, TRAIN, Corpus
from smolforge.data.documents import PYTHON_DOCS, Document, files
from smolforge.data.encoding import FORMS, Encoded
from smolforge.errors import InvalidFile, SettingError
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.turns import chat_tokenizer

log = logging.getLogger("smolforge")
FEWEST_GROUPS = 20
BORDER_CHARACTERS = 1000
BATCH_BYTES = 4 << 20
SHARD_TOKENS = 1 << 28
OF_READING = ("intra_document_masking", "num_workers")
"""Settings of how a corpus is read, whatever they are it is the same."""
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
) -> Corpus:
    """Make the corpus of `data` in `folder`, or return the one already there if it is the same.

    Without a tokenizer one of `vocab_size` is trained on the training part. `max_tokens` is an upper
    limit of both parts together, each in its share. `report` is told documents, tokens and bytes so far.

    Raises InvalidFile for sources that cannot be read, SettingError where `folder` holds something else,
    MissingResource when the disk is full.
    """
    tokenizer = for_format(data, tokenizer)
    request = request_of(data, tokenizer, vocab_size, max_tokens)
    if (folder / "corpus.json").is_file():
        corpus = Corpus.open(folder)
        if corpus.facts["request"] == request:
            return corpus
        raise SettingError(
            f"{folder} holds a corpus made with other settings, or from files that changed since; "
            "give another folder, or delete it"
        )
    if folder.exists() and any(folder.iterdir()):
        raise SettingError(f"{folder} exists and is not a corpus; give another folder")
    plans = {source: survey(source, data) for source in data.sources}
    if tokenizer is None:
        read = _split(plans, data, Counter())
        texts = (FORMS[data.format].words(document) for split, document in read if split == TRAIN)
        tokenizer = for_format(data, Tokenizer.train(texts, vocab_size))
        assert tokenizer is not None
    room = dict.fromkeys(SPLITS, math.inf)
    if max_tokens is not None:
        held_out = int(max_tokens * data.held_out)
        room = {TRAIN: float(max_tokens - held_out), HELD_OUT: float(held_out)}
    described: dict[str, Any] = {"format_version": FORMAT_VERSION, "request": request}
    if PYTHON_DOCS in data.sources:
        described["python"] = platform.python_version()

    def fill(temporary: Path) -> None:
        tokenizer.save(temporary / "tokenizer")
        dropped: Counter[str] = Counter(repeated=0)
        facts = _write(temporary, _split(plans, data, dropped), tokenizer, data.format, room, dropped, report)
        facts["dropped"] = dict(dropped)
        (temporary / "corpus.json").write_text(json.dumps(described | facts, indent=2) + "\n", "utf-8")

    if folder.exists():
        folder.rmdir()
    commit.write_whole(folder, fill)
    return Corpus.open(folder)


def clear(folder: Path, data: Data, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Delete what `prepare` would find in the way, and nothing it would return."""
    wanted = request_of(data, for_format(data, tokenizer), vocab_size, None)
    try:
        same = Corpus.open(folder).facts["request"] == wanted
    except InvalidFile:
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)


def for_format(data: Data, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer with what a format needs of it, if there is one yet."""
    return chat_tokenizer(tokenizer) if tokenizer is not None and data.format != "text" else tokenizer


def request_of(data: Data, tokenizer: Tokenizer | None, vocab_size: int, max_tokens: int | None) -> dict[str, Any]:
    """All that decides what is in a corpus."""
    made_by = tokenizer.fingerprint if tokenizer else f"trained, {vocab_size} ids"
    asked = {
        "data": data.model_dump(mode="json", exclude=set(OF_READING)),
        "tokenizer": made_by,
        "max_tokens": max_tokens,
        "files": {source: stamp(source) for source in data.sources},
    }
    if data.format != "text":
        template = tokenizer.template.source if tokenizer and tokenizer.template else CHATML
        asked["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return asked


class Plan:
    """Which part of one source is held out: of few documents that are `divisible`, the end of the last."""

    def __init__(self, groups: dict[str, int], held_out: float, divisible: bool = True) -> None:
        total, fewest = sum(groups.values()), FEWEST_GROUPS if divisible else 2
        self.by_group = len(groups) >= fewest and held_out > 0
        self.train_characters = total * (1 - held_out) if divisible else math.inf
        self.held_out_groups: set[str] = set()
        if self.by_group:
            # In the order of a hash, every group that still fits into the share; never none at all.
            room = total * held_out
            for group in sorted(groups, key=_digest):
                if groups[group] <= room:
                    self.held_out_groups.add(group)
                    room -= groups[group]
            self.held_out_groups = self.held_out_groups or {min(groups, key=lambda group: groups[group])}

    def pieces(self, document: Document, start: int) -> Iterator[tuple[str, Document]]:
        """The document, or its two parts where the source's tail begins inside it.

        `start` is the number of characters of the source before it.
        """
        text = document.text
        if self.by_group:
            yield HELD_OUT if document.group in self.held_out_groups else TRAIN, document
        elif start + len(text) <= self.train_characters:
            yield TRAIN, document
        else:
            cut = max(0, int(self.train_characters) - start)
            near = max(0, cut - BORDER_CHARACTERS)
            border = text.rfind("\n" if "\n" in text[near:cut] else " ", near, cut)
            cut = border + 1 if border >= 0 else cut
            if cut:
                yield TRAIN, Document(document.group, text[:cut])
            yield HELD_OUT, Document(document.group, text[cut:])


def stamp(source: str) -> list[int]:
    """Number, bytes and latest change of a source's files: what tells whether they are still the same."""
    found = [path.stat() for path in files(source)] if source != PYTHON_DOCS else []
    return [len(found), sum(stat.st_size for stat in found), max((stat.st_mtime_ns for stat in found), default=0)]


def survey(source: str, data: Data) -> Plan:
    """One pass over a source: how its held-out part is chosen."""
    groups: dict[str, int] = defaultdict(int)
    for document in FORMS[data.format].read(source, data):
        groups[document.group] += len(document.text)
    if not sum(groups.values()):
        raise InvalidFile(f"the data source {source!r} is empty")
    return Plan(groups, data.held_out, FORMS[data.format].divisible)


def _split(plans: dict[str, Plan], data: Data, dropped: Counter[str]) -> Iterator[tuple[str, Document]]:
    """Every document once, with its split. Empty ones and exact repetitions are dropped, these counted."""
    seen: set[bytes] = set()
    for source, plan in plans.items():
        start = 0
        for document in FORMS[data.format].read(source, data):
            digest = _digest(document.text)
            if digest in seen:
                dropped["repeated"] += 1
            elif document.text.strip():
                seen.add(digest)
                yield from plan.pieces(document, start)
            start += len(document.text)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _write(
    folder: Path,
    pieces: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    form: str,
    room: dict[str, float],
    dropped: Counter[str],
    report: Report,
) -> dict[str, Any]:
    """Tokenise and write all pieces; returns what corpus.json says of them."""
    token_bytes = 2 if len(tokenizer) <= 1 << 16 else 4
    writers = {split: ShardWriter(folder / split, tokenizer, token_bytes) for split in SPLITS}
    lost: Counter[int] = Counter()
    wanted = (piece for piece in pieces if writers[piece[0]].size["tokens"] < room[piece[0]])
    for batch in _batches(wanted):
        encoded = FORMS[form].encode(tokenizer, [document for _, document in batch])
        for (split, _), whole in zip(batch, encoded, strict=True):
            dropped["unanswered"] += not whole
            for each in whole:
                lost.update(each.lost)
            for part in FORMS[form].fitting(tokenizer, whole, room[split] - writers[split].size["tokens"]):
                writers[split].add(part)
        report({key: sum(writer.size[key] for writer in writers.values()) for key in ("documents", "tokens", "bytes")})
    if not any(writer.size["tokens"] for writer in writers.values()):
        raise InvalidFile(f"the data sources hold {NOTHING[form]}")
    for writer in writers.values():
        writer.close()
    if lost:
        named = ", ".join(f"{byte:02x}" for byte in sorted(lost))
        log.warning("%d bytes of the text (%s) have no symbol in this tokenizer and are left out", lost.total(), named)
    digests = [writer.digest.hexdigest() for writer in writers.values()]
    if form != "text":
        digests += [writer.loss_digest.hexdigest() for writer in writers.values()]
    return {
        "format": form,
        "fingerprint": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "token_bytes": token_bytes,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.fingerprint,
        "lost_bytes": {f"{byte:02x}": count for byte, count in sorted(lost.items())},
        "splits": {split: writer.size for split, writer in writers.items()},
    }


def _batches(pieces: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Runs of documents of a few megabytes: enough to keep all cores busy, little to hold."""
    batch: list[tuple[str, Document]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1].text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class ShardWriter:
    """Writes one split in datatrove's format, a new shard every SHARD_TOKENS. Of conversations `.ds.loss` has a byte a
    token, which says whether it is learned.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, token_bytes: int) -> None:
        self.folder, self.tokenizer, self.token_bytes = folder, tokenizer, token_bytes
        self.size = {"documents": 0, "tokens": 0, "bytes": 0}
        self.digest, self.loss_digest = hashlib.sha256(), hashlib.sha256()
        self.numbers = itertools.count()
        self.file: BinaryIO | None = None
        self.loss_file: BinaryIO | None = None
        self.path = folder
        self.ends: list[int] = []
        folder.mkdir(parents=True)

    def add(self, document: Encoded) -> None:
        """Append a document, and begin another shard where this one is full."""
        if self.file is None:
            self.path = self.folder / f"{next(self.numbers):05d}.ds"
            self.file, self.ends = self.path.open("wb"), []
        content = np.asarray(document.ids, f"<u{self.token_bytes}").tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(document.ids))
        counts = {"documents": 1, "tokens": len(document.ids), "bytes": document.text_bytes}
        if document.learned is not None:
            self._add_loss(document.learned)
            counts |= {"learned_tokens": sum(document.learned), "learned_bytes": document.learned_bytes}
        for key, count in counts.items():
            self.size[key] = self.size.get(key, 0) + count
        if self.ends[-1] >= SHARD_TOKENS:
            self.close()

    def _add_loss(self, learned: list[bool]) -> None:
        if self.loss_file is None:
            self.loss_file = self.path.with_suffix(".ds.loss").open("wb")
        content = np.asarray(learned, "?").tobytes()
        self.loss_file.write(content)
        self.loss_digest.update(content)

    def close(self) -> None:
        if self.file is None:
            return
        self.file.close()
        self.file = None
        if self.loss_file is not None:
            self.loss_file.close()
            self.loss_file = None
        self.path.with_suffix(".ds.index").write_bytes(np.asarray(self.ends, "<u8").tobytes())
        name = f"{self.tokenizer.fingerprint}|{self.token_bytes}"
        self.path.with_suffix(".ds.metadata").write_text(f"{name}\n{self.ends[-1]}\n{self.ends[-1]:,} T\n", "utf-8")
