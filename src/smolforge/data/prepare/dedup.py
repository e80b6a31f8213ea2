"""Which documents stay: the first of those that are equal, and where it is asked for of those nearly so.

digests, bands of all documents, in the order of the sources  ->  NEW, REPEATED or NEAR, of each

A document is near one before it where they share a band (minhash.py), whether that one stays or not. What stays follows
from what stands before it alone: not from who read it, nor from how much is read behind it. No two that stay share a
band, so none that is held out is near one that is trained on.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from smolforge.config import Data
from smolforge.data.corpus import SPLITS
from smolforge.data.prepare.chunks import BANDS, bands_in, rows_of
from smolforge.data.prepare.documents import Document
from smolforge.data.prepare.token_budget import Rooms
from smolforge.data.prepare.tokenize_documents import FORMS
from smolforge.errors import MissingResource
from smolforge.tokenizer import Tokenizer

COMPARED = 1 << 22
"""Digests that are sorted at a time."""
LONGEST = 8 << 20
"""Characters of the longest document that is compared with others."""
NEW, REPEATED, NEAR = range(3)

Compare = Callable[[Document], np.ndarray]
"""The bands of a document; zeros where it is like no other."""


def comparison(data: Data, tokenizer: Tokenizer | None) -> Compare | None:
    """What finds near duplicates, if they are to be found. Raises MissingResource where datatrove is not there."""
    if data.deduplication == "exact":
        return None
    try:
        from smolforge.data.prepare.minhash import bands_of
    except ImportError:
        raise MissingResource(
            "near duplicates are found by datatrove's MinHash; pip install 'smolforge[data]' brings it"
        ) from None
    form = FORMS[data.format]

    def compare(document: Document) -> np.ndarray:
        text = form.words(document) if document.ids is None else text_of(document.ids, tokenizer)
        return bands_of(text if document.ends and len(text) <= LONGEST else "")

    return compare


def text_of(ids: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """What was tokenised already."""
    assert tokenizer is not None, "tokens are read with the tokenizer that made them"
    return tokenizer.decode(ids[ids != tokenizer.eos_id].tolist())


def standings(chunks: Sequence[Path]) -> list[np.ndarray]:
    """Of each chunk's rows, what the document is that they belong to."""
    firsts, digests = [np.empty(0, "?")], [np.empty((0, 2), "<u8")]
    for chunk in chunks:
        rows = rows_of(chunk)
        firsts.append(rows["first"].copy())  # not a view, which would hold all of the rows
        digests.append(rows["digest"][rows["first"]])
    found = judged(chunks, np.concatenate(digests))
    whose = np.cumsum(np.concatenate(firsts)) - 1
    borders = np.cumsum([len(each) for each in firsts])[:-1]
    return np.split(found[whose] if len(whose) else found, borders)[1:]


def judged(chunks: Sequence[Path], digests: np.ndarray) -> np.ndarray:
    """What each document is, of those whose digests are (documents, 2)."""
    found = np.full(len(digests), NEW, "u1")
    if banded := [bands_in(chunk) for chunk in chunks if (chunk / BANDS).is_file()]:
        found[near_one_before(np.concatenate(of_band) for of_band in zip(*banded, strict=True))] = NEAR
    found[~first_of_each(digests)] = REPEATED
    return found


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Whether a row of (n, 2) is the first that is as it is; sorted in buckets, by some bits of it."""
    new = np.zeros(len(digests), "?")
    buckets = 1 + len(digests) // COMPARED
    for bucket in range(buckets):
        places = np.flatnonzero(digests[:, 0] % np.uint64(buckets) == bucket)
        found = digests[places]
        order = np.lexsort((places, found[:, 1], found[:, 0]))
        differs = np.ones(len(order), "?")
        differs[1:] = (np.diff(found[order], axis=0) != 0).any(1)
        new[places[order[differs]]] = True
    return new


def near_one_before(bands: Iterable[np.ndarray]) -> np.ndarray:
    """Whether a document has a band, of (n) in each, that one before it has. A band of 0 is none."""
    near = np.empty(0, "?")
    for band in bands:
        near = near if len(near) else np.zeros(len(band), "?")
        again = band != 0
        again[np.unique(band, return_index=True)[1]] = False
        near |= again
    return near


def tokens_of(chunks: Sequence[Path], rooms: Rooms) -> Rooms:
    """The room that all that is new in these chunks takes."""
    taken = rooms.copy()
    for chunk, standing in zip(chunks, standings(chunks), strict=True):
        rows = rows_of(chunk)[standing == NEW]
        for number, split in enumerate(SPLITS):
            taken.take(split, int(rows["length"][rows["split"] == number].sum()))
    return taken
