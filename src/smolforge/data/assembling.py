"""The chunks of all tasks to the shards of a corpus, in the order of the sources.

chunks  ->  (the same or near one before it: left out)  ->  as much as there is room for  ->  {train,held_out}/00000.ds
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smolforge.data.chunks import facts_of, rows_of, token_bytes
from smolforge.data.corpus import HELD_OUT, SPLITS, TRAIN
from smolforge.data.duplicates import NEAR, NEW, REPEATED, standings
from smolforge.data.encoding import FORMS, Encoded
from smolforge.data.rooms import Rooms
from smolforge.data.writing import ShardWriter
from smolforge.tokenizer import Tokenizer

log = logging.getLogger("smolforge")


def assemble(
    folder: Path, chunks: Sequence[Path], tokenizer: Tokenizer, form: str, rooms: Rooms, sources: Sequence[str]
) -> tuple[dict[str, Any], Counter[str]]:
    """Write the shards; `sources` names each chunk's. Returns what corpus.json says of them, and what was left out."""
    size = token_bytes(tokenizer)
    writers = {split: ShardWriter(folder / split, tokenizer, size) for split in SPLITS}
    dropped: Counter[str] = Counter(repeated=0)
    lost: Counter[int] = Counter()
    of_sources: Counter[str] = Counter(dict.fromkeys(sources, 0))
    rooms = rooms.copy()
    for chunk, standing, source in zip(chunks, standings(chunks), sources, strict=True):
        before = writers[TRAIN].size["tokens"]
        rows, facts = rows_of(chunk), facts_of(chunk)
        dropped.update(facts["dropped"])
        dropped["repeated"] += int((rows["first"] & (standing == REPEATED)).sum())
        if near := int((rows["first"] & (standing == NEAR)).sum()):
            dropped["near_duplicates"] += near
        lost.update({int(byte): count for byte, count in facts["lost"].items()})
        read = Read(chunk, rows, standing == NEW, size, form)
        if rooms.limits[0] is None:
            read.all_into(writers)
        else:
            read.some_into(writers, tokenizer, rooms)
        of_sources[source] += writers[TRAIN].size["tokens"] - before
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
        "token_bytes": size,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.fingerprint,
        "lost_bytes": {f"{byte:02x}": count for byte, count in sorted(lost.items())},
        "splits": {split: writer.size for split, writer in writers.items()},
        "train_tokens_of_sources": dict(of_sources),
    }, dropped


class Read:
    """One chunk, and what of its rows is kept."""

    def __init__(self, chunk: Path, rows: np.ndarray, keep: np.ndarray, size: int, form: str) -> None:
        self.rows, self.keep, self.form = rows, keep, form
        self.ids = np.fromfile(chunk / "ids", f"<u{size}")
        self.learned = np.fromfile(chunk / "learned", "?") if form != "text" else None

    def all_into(self, writers: dict[str, ShardWriter]) -> None:
        for number, split in enumerate(SPLITS):
            of_split = self.keep & (self.rows["split"] == number)
            if not of_split.any():
                continue
            tokens, rows = np.repeat(of_split, self.rows["length"]), self.rows[of_split]
            learned = self.learned[tokens] if self.learned is not None else None
            writers[split].add_all(self.ids[tokens], rows["length"], rows["ends"], learned)
            writers[split].count(bytes=int(rows["text_bytes"].sum()))
            if learned is not None:
                writers[split].count(learned_bytes=int(rows["learned_bytes"].sum()))

    def some_into(self, writers: dict[str, ShardWriter], tokenizer: Tokenizer, rooms: Rooms) -> None:
        """Document by document, up to the first that does not fit."""
        fitting = FORMS[self.form].fitting
        for split, whole in self.documents():
            found = fitting(tokenizer, whole, rooms.left(split))
            if not found:
                rooms.close(split)
            for each in found:
                rooms.take(split, len(each.ids))
                writers[split].add(each)

    def documents(self) -> Iterable[tuple[str, list[Encoded]]]:
        """Documents of one split; the two conversations of a pair are one."""
        stops = np.cumsum(self.rows["length"])
        whole: list[Encoded] = []
        before = None
        for number in np.flatnonzero(self.keep):
            row = self.rows[number]
            span = slice(int(stops[number] - row["length"]), int(stops[number]))
            learned = self.learned[span].tolist() if self.learned is not None else None
            sizes = int(row["text_bytes"]), b"", learned, int(row["learned_bytes"])
            each = Encoded(self.ids[span].tolist(), *sizes, bool(row["ends"]))
            split = SPLITS[row["split"]]
            if whole and (row["first"] or split != before or self.form == "text"):
                yield before or HELD_OUT, whole
                whole = []
            whole, before = [*whole, each], split
        if whole:
            yield before or HELD_OUT, whole
