"""A prepared corpus: token ids on disk, read through memory maps.

The shards, DIR/{train,held_out}/00000.ds, are datatrove's: `.ds` little-endian ids, `.ds.index` document ends,
`.ds.metadata`. Of conversations, each of which is a document, `.ds.loss` has a byte a token: whether it is learned. Of
pairs each is two neighbouring documents, the chosen conversation and the rejected one.
Beside them `corpus.json` says what went in, how much it is, and its fingerprint.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from smolforge.errors import InvalidFileError
from smolforge.tokenizer import Tokenizer

FORMAT_VERSION = 1
TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)
TOKENS_PER_READ = 1 << 16
"""Tokens to read at a time, where a text is read from its beginning to its end."""
MAX_TOKENS_PER_CHARACTER = 4
"""Tokens that one character is made of at most, a byte each."""


class Corpus:
    """A prepared corpus, read lazily through memory maps."""

    def __init__(self, folder: Path, metadata: dict[str, Any]) -> None:
        self.folder, self.metadata = folder, metadata
        self.fingerprint: str = metadata["fingerprint"]

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Raises InvalidFileError where the folder holds no whole corpus."""
        try:
            metadata = json.loads((folder / "corpus.json").read_text("utf-8"))
            splits, version = metadata["splits"], metadata["format_version"]
            expected = {(split, ".ds"): splits[split]["tokens"] * metadata["token_bytes"] for split in SPLITS}
            expected |= {(split, ".ds.index"): splits[split]["documents"] * 8 for split in SPLITS}
            if metadata.get("format", "text") != "text":
                expected |= {(split, ".ds.loss"): splits[split]["tokens"] for split in SPLITS}
        except FileNotFoundError:
            raise InvalidFileError(f"{folder} is not a prepared corpus: it has no corpus.json") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidFileError(
                f"{folder / 'corpus.json'} is broken: {error!r}; delete the corpus, and prepare it again"
            ) from None
        if version != FORMAT_VERSION:
            raise InvalidFileError(f"{folder} has corpus format {version}; this version reads {FORMAT_VERSION}")
        for (split, kind), size in expected.items():
            num_bytes = sum(file.stat().st_size for file in (folder / split).glob(f"*{kind}"))
            if num_bytes != size:
                content = {".ds": "tokens", ".ds.index": "ends of documents"}.get(kind, "what is learned (.ds.loss)")
                raise InvalidFileError(
                    f"{folder / split} holds {num_bytes:,} bytes of {content} where corpus.json says {size:,}; "
                    "delete the corpus, and prepare it again"
                )
        return cls(folder, metadata)

    def tokens(self, split: str) -> "Tokens":
        shards = sorted((self.folder / split).glob("*.ds"))
        return Tokens([np.memmap(shard, f"<u{self.metadata['token_bytes']}", "r") for shard in shards])

    @property
    def format(self) -> str:
        """text, chat or pairs. Of the documents of the last two, conversations, only a part is learned."""
        return self.metadata.get("format", "text")

    def learned(self, split: str) -> "Tokens":
        """1 for each token of conversations that is learned, else 0."""
        return Tokens([np.memmap(shard, "u1", "r") for shard in sorted((self.folder / split).glob("*.ds.loss"))])

    def ends(self, split: str) -> np.ndarray:
        """Where each document ends in `tokens`. Raises InvalidFileError where that is not all of them."""
        shards = [np.fromfile(index, "<u8") for index in sorted((self.folder / split).glob("*.ds.index"))]
        before = np.cumsum([0, *(int(shard[-1]) if len(shard) else 0 for shard in shards)])
        if before[-1] != self.size(split)["tokens"]:
            raise InvalidFileError(
                f"the documents of {self.folder / split} end at token {before[-1]:,} where corpus.json says "
                f"{self.size(split)['tokens']:,}; delete the corpus, and prepare it again"
            )
        parts = [shard + start for shard, start in zip(shards, before[:-1], strict=True)]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def text(self, split: str) -> str:
        """The text behind the tokens, documents joined."""
        ids, tokenizer = self.tokens(split)[:], self.tokenizer()
        return tokenizer.decode(ids[~np.isin(ids, tokenizer.border_ids)].tolist())

    def texts(self, split: str, at_once: int = TOKENS_PER_READ) -> Iterator[tuple[str, bool, int]]:
        """The text in pieces of about `at_once` tokens or a document: its text, whether the document ends with it, and
        how many tokens that are. Joined, the pieces of a document are its text.
        """
        ids, eos_id, tokenizer = self.tokens(split), self.metadata["eos_id"], self.tokenizer()
        pieces = DocumentDecoder(tokenizer)
        for start in range(0, len(ids), at_once):
            window = ids[start : start + at_once]
            for part in np.split(window, np.flatnonzero(window == eos_id) + 1):
                if len(part):
                    ends = int(part[-1]) == eos_id
                    yield pieces.push(part[~np.isin(part, tokenizer.border_ids)].tolist(), ends), ends, len(part)

    def size(self, split: str) -> dict[str, int]:
        """documents, tokens and bytes (of UTF-8 text) of one split."""
        return self.metadata["splits"][split]

    def tokenizer(self) -> Tokenizer:
        """Raises InvalidFileError where it is not the one that made the tokens."""
        tokenizer = Tokenizer.load(self.folder / "tokenizer")
        if tokenizer.fingerprint != self.metadata["tokenizer"]:
            raise InvalidFileError(f"{self.folder / 'tokenizer'} is damaged: it is not what made the corpus")
        return tokenizer

    def check(self) -> None:
        """Hold every token to the fingerprint, a gigabyte in half a second. Raises InvalidFileError."""
        digests = []
        kinds = ("*.ds", "*.ds.loss") if self.format != "text" else ("*.ds",)
        for kind, split in itertools.product(kinds, SPLITS):
            digest = hashlib.sha256()
            for shard in sorted((self.folder / split).glob(kind)):
                with shard.open("rb") as file:
                    while part := file.read(1 << 20):
                        digest.update(part)
            digests.append(digest.hexdigest())
        if hashlib.sha256("".join(digests).encode()).hexdigest() != self.fingerprint:
            raise InvalidFileError(
                f"the tokens in {self.folder} are damaged: they are not what was prepared; prepare them again"
            )


class Tokens:
    """The ids of all shards as one long array, of which only what is sliced is read."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self.shards = shards
        self.starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(len(self))
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = int(self.starts[first])
            parts.append(self.shards[first][start - offset : stop - offset])
            start, first = int(self.starts[first + 1]), first + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


class DocumentDecoder:
    """Decode a document's ids as they come, as far as the characters are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.context: list[int] = []  # the last ids that were given out: decoders treat the first of a text differently
        self.pending: list[int] = []

    def push(self, ids: list[int], ends: bool) -> str:
        """Return the text that these ids complete; all that is left where the document ends."""
        ids = self.pending + ids
        complete = len(ids) if ends else self._complete_length(ids)
        before = self.tokenizer.decode(self.context)
        text = self.tokenizer.decode(self.context + ids[:complete])[len(before) :]
        self.context = [] if ends else (self.context + ids[:complete])[-MAX_TOKENS_PER_CHARACTER:]
        self.pending = ids[complete:]
        return text

    def _complete_length(self, ids: list[int]) -> int:
        """How many of the ids end with a whole character."""
        for length in range(len(ids), max(0, len(ids) - MAX_TOKENS_PER_CHARACTER), -1):
            if not self.tokenizer.decode(ids[max(0, length - MAX_TOKENS_PER_CHARACTER) : length]).endswith("\ufffd"):
                return length
        return len(ids) if len(ids) >= MAX_TOKENS_PER_CHARACTER else 0
