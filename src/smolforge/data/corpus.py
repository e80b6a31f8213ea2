"""A prepared corpus: token ids on disk, read through memory maps.

The shards, DIR/{train,held_out}/00000.ds, are datatrove's: `.ds` little-endian ids, `.ds.index` document ends,
`.ds.metadata`. Of conversations, each of which is a document, `.ds.loss` has a byte a token: whether it is learned.
Beside them `corpus.json` says what went in, how much it is, and its fingerprint.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from smolforge.errors import InvalidFile
from smolforge.tokenizer import Tokenizer

FORMAT_VERSION = 1
TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)


class Corpus:
    """A prepared corpus, read lazily through memory maps."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.fingerprint: str = facts["fingerprint"]

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Raises InvalidFile where the folder holds no whole corpus."""
        try:
            facts = json.loads((folder / "corpus.json").read_text("utf-8"))
            splits, version = facts["splits"], facts["format_version"]
            expected = {(split, ".ds"): splits[split]["tokens"] * facts["token_bytes"] for split in SPLITS}
            if facts.get("format") == "chat":
                expected |= {(split, ".ds.loss"): splits[split]["tokens"] for split in SPLITS}
        except FileNotFoundError:
            raise InvalidFile(f"{folder} is not a prepared corpus: it has no corpus.json") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidFile(f"{folder / 'corpus.json'} is broken: {error!r}; prepare the corpus again") from None
        if version != FORMAT_VERSION:
            raise InvalidFile(f"{folder} has corpus format {version}; this version reads {FORMAT_VERSION}")
        for (split, kind), size in expected.items():
            found = sum(file.stat().st_size for file in (folder / split).glob(f"*{kind}"))
            if found != size:
                what = "tokens" if kind == ".ds" else "what is learned (.ds.loss)"
                raise InvalidFile(
                    f"{folder / split} holds {found:,} bytes of {what} where corpus.json says {size:,}; "
                    "prepare the corpus again"
                )
        return cls(folder, facts)

    def tokens(self, split: str) -> "Tokens":
        shards = sorted((self.folder / split).glob("*.ds"))
        return Tokens([np.memmap(shard, f"<u{self.facts['token_bytes']}", "r") for shard in shards])

    @property
    def is_chat(self) -> bool:
        """Whether its documents are conversations, of which only a part is learned."""
        return self.facts.get("format") == "chat"

    def learned(self, split: str) -> "Tokens":
        """1 for each token of conversations that is learned, else 0."""
        return Tokens([np.memmap(shard, "u1", "r") for shard in sorted((self.folder / split).glob("*.ds.loss"))])

    def ends(self, split: str) -> np.ndarray:
        """Where each document ends in `tokens`."""
        shards = [np.fromfile(index, "<u8") for index in sorted((self.folder / split).glob("*.ds.index"))]
        before = np.cumsum([0, *(shard[-1] for shard in shards)])
        parts = [shard + start for shard, start in zip(shards, before[:-1], strict=True)]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def text(self, split: str) -> str:
        """The text behind the tokens, documents joined."""
        ids = self.tokens(split)[:]
        return self.tokenizer().decode(ids[ids != self.facts["eos_id"]].tolist())

    def size(self, split: str) -> dict[str, int]:
        """documents, tokens and bytes (of UTF-8 text) of one split."""
        return self.facts["splits"][split]

    def tokenizer(self) -> Tokenizer:
        """Raises InvalidFile where it is not the one that made the tokens."""
        found = Tokenizer.load(self.folder / "tokenizer")
        if found.fingerprint != self.facts["tokenizer"]:
            raise InvalidFile(f"{self.folder / 'tokenizer'} is damaged: it is not what made the corpus")
        return found

    def check(self) -> None:
        """Hold every token to the fingerprint, a gigabyte in half a second. Raises InvalidFile."""
        digests = []
        kinds = ("*.ds", "*.ds.loss") if self.is_chat else ("*.ds",)
        for kind, split in itertools.product(kinds, SPLITS):
            digest = hashlib.sha256()
            for shard in sorted((self.folder / split).glob(kind)):
                with shard.open("rb") as file:
                    while part := file.read(1 << 20):
                        digest.update(part)
            digests.append(digest.hexdigest())
        if hashlib.sha256("".join(digests).encode()).hexdigest() != self.fingerprint:
            raise InvalidFile(
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
