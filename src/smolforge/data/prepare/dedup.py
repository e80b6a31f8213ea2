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
from smolforge.data.prepare.chunks import BANDS_FILE, load_bands, load_rows
from smolforge.data.prepare.documents import Document
from smolforge.data.prepare.token_budget import TokenBudget
from smolforge.data.prepare.tokenize_documents import DATA_FORMATS
from smolforge.errors import MissingResourceError, install_command
from smolforge.tokenizer import Tokenizer

DIGESTS_PER_SORT = 1 << 22
"""Digests that are sorted at a time."""
MAX_COMPARED_CHARACTERS = 8 << 20
"""Characters of the longest document that is compared with others."""
NEW, REPEATED, NEAR = range(3)

BandFunction = Callable[[Document], np.ndarray]
"""The bands of a document; zeros where it is like no other."""


def band_function(data: Data, tokenizer: Tokenizer | None) -> BandFunction | None:
    """Return what computes the MinHash bands of a document, or None for exact deduplication.

    Raises MissingResourceError where datatrove is not installed.
    """
    if data.deduplication == "exact":
        return None
    try:
        from smolforge.data.prepare.minhash import bands_of
    except ImportError:
        raise MissingResourceError(
            f"near duplicates are found by datatrove's MinHash; {install_command('data')} brings it"
        ) from None
    data_format = DATA_FORMATS[data.format]

    def compare(document: Document) -> np.ndarray:
        text = data_format.training_text(document) if document.ids is None else decode_document(document.ids, tokenizer)
        return bands_of(text if document.ends and len(text) <= MAX_COMPARED_CHARACTERS else "")

    return compare


def decode_document(ids: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """Return the text of a document that is tokenized already."""
    assert tokenizer is not None, "tokens are read with the tokenizer that made them"
    return tokenizer.decode(ids[~np.isin(ids, tokenizer.border_ids)].tolist())


def document_status(chunks: Sequence[Path]) -> list[np.ndarray]:
    """Return for each chunk's rows the status of the document they belong to: NEW, REPEATED or NEAR."""
    firsts, digests = [np.empty(0, "?")], [np.empty((0, 2), "<u8")]
    for chunk in chunks:
        rows = load_rows(chunk)
        firsts.append(rows["first"].copy())  # not a view, which would hold all of the rows
        digests.append(rows["digest"][rows["first"]])
    status = dedup_status(chunks, np.concatenate(digests))
    document_index = np.cumsum(np.concatenate(firsts)) - 1
    borders = np.cumsum([len(first) for first in firsts])[:-1]
    return np.split(status[document_index] if len(document_index) else status, borders)[1:]


def dedup_status(chunks: Sequence[Path], digests: np.ndarray) -> np.ndarray:
    """Return the status of each document, given digests (documents, 2)."""
    status = np.full(len(digests), NEW, "u1")
    if banded := [load_bands(chunk) for chunk in chunks if (chunk / BANDS_FILE).is_file()]:
        status[is_near_duplicate(np.concatenate(of_band) for of_band in zip(*banded, strict=True))] = NEAR
    status[~is_first_occurrence(digests)] = REPEATED
    return status


def is_first_occurrence(digests: np.ndarray) -> np.ndarray:
    """Whether a row of (n, 2) is the first that is as it is; sorted in buckets, by some bits of it."""
    is_first = np.zeros(len(digests), "?")
    buckets = 1 + len(digests) // DIGESTS_PER_SORT
    for bucket in range(buckets):
        indices = np.flatnonzero(digests[:, 0] % np.uint64(buckets) == bucket)
        bucket_digests = digests[indices]
        order = np.lexsort((indices, bucket_digests[:, 1], bucket_digests[:, 0]))
        differs = np.ones(len(order), "?")
        differs[1:] = (np.diff(bucket_digests[order], axis=0) != 0).any(1)
        is_first[indices[order[differs]]] = True
    return is_first


def is_near_duplicate(bands: Iterable[np.ndarray]) -> np.ndarray:
    """Whether a document has a band, of (n) in each, that one before it has. A band of 0 is none."""
    near = np.empty(0, "?")
    for band in bands:
        near = near if len(near) else np.zeros(len(band), "?")
        repeated = band != 0
        repeated[np.unique(band, return_index=True)[1]] = False
        near |= repeated
    return near


def spent_budget(chunks: Sequence[Path], budget: TokenBudget) -> TokenBudget:
    """Return a budget from which all new documents in these chunks have been taken."""
    spent = budget.copy()
    for chunk, status in zip(chunks, document_status(chunks), strict=True):
        rows = load_rows(chunk)[status == NEW]
        for number, split in enumerate(SPLITS):
            spent.take(split, int(rows["length"][rows["split"] == number].sum()))
    return spent
