"""Text to token ids and back.

A tokenizer is Hugging Face's `tokenizer.json`, run by the tokenizers library. User text never yields a
special token: `<|endoftext|>` inside a document is encoded as the characters it is made of.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from smolforge.errors import InvalidFile, SettingError

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
PART_CHARACTERS = 1 << 20
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


class Tokenizer:
    """One tokenizer.json and the settings beside it."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any] | None = None) -> None:
        self.backend = backend
        self.backend.encode_special_tokens = True
        self.settings = settings or {}
        self.eos_token = self._named("eos_token") or END_OF_TEXT
        eos_id = backend.token_to_id(self.eos_token)
        if eos_id is None:
            raise InvalidFile(
                f"the tokenizer has no end-of-text token {self.eos_token!r}; "
                "name the right one as eos_token in its tokenizer_config.json"
            )
        self.eos_id: int = eos_id
        pipeline = json.loads(backend.to_str())
        pattern = json.dumps(pipeline["pre_tokenizer"])
        self.byte_level = pipeline["normalizer"] is None and '"ByteLevel"' in pattern and '"Split"' not in pattern

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json, or the folder that holds one.

        Raises InvalidFile where there is none, or it is broken.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InvalidFile(f"there is no tokenizer.json at {path}; name a local folder or file that has one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise InvalidFile(f"{file} is not a tokenizer: {error}") from None
        beside = file.with_name("tokenizer_config.json")
        try:
            settings = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        except ValueError as error:
            raise InvalidFile(f"{beside} is not JSON: {error}") from None
        template = file.with_name("chat_template.jinja")
        if template.is_file():
            settings = {**settings, "chat_template": template.read_text("utf-8")}
        return cls(backend, settings)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a byte-level BPE with SmolLM2's pipeline: digits alone, then GPT-2's word pattern.

        All 256 bytes are in the vocabulary, so any text survives the round trip (the published
        tokenizer lacks 21 of them). A short text may yield fewer than `vocab_size` ids.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        smallest = len(alphabet) + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise SettingError(f"a byte-level tokenizer needs a vocab_size of at least {smallest}, not {vocab_size}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(
            backend,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "unk_token": END_OF_TEXT,
                "clean_up_tokenization_spaces": False,
            },
        )

    def __len__(self) -> int:
        """Number of ids, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """The id a text may begin with. Nothing is added by `encode`."""
        token = self._named("bos_token")
        return None if token is None else self.backend.token_to_id(token)

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the ids of a text."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, using all cores."""
        parts = [list(split_at_lines(text)) if self.byte_level else [text] for text in texts]
        flat = iter(self.backend.encode_batch_fast([part for text in parts for part in text], add_special_tokens=False))
        return [[token for _ in text for token in next(flat).ids] for text in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are spelled out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write the files Transformers reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {"eos_token": self.eos_token, **self.settings}
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )

    def _named(self, key: str) -> str | None:
        token = self.settings.get(key)
        return token["content"] if isinstance(token, dict) else token


def split_at_lines(text: str) -> Iterator[str]:
    """Parts of about a million characters, so that one long file uses all cores and little memory.

    GPT-2's word pattern takes a single newline between visible characters by itself, so a cut behind it
    changes no token. (Behind one of several newlines it would.)
    """
    start = 0
    while len(text) - start > PART_CHARACTERS:
        cut = _LINE_END.search(text, start + PART_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


class IncrementalDecoder:
    """Ids in one at a time, text out as soon as its characters are whole.

    The joined pieces equal `decode` of all ids; a character cut in the middle waits for its rest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.settled: list[int] = []  # the last ids already given out, kept as context
        self.waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that became whole with this id, perhaps none."""
        self.waiting.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self.settled, self.waiting = self.waiting, []
        return text

    def finish(self) -> str:
        """What is still waiting, broken as it may be."""
        text = self._new_text() if self.waiting else ""
        self.settled, self.waiting = self.waiting, []
        return text

    def _new_text(self) -> str:
        # Decoded behind the ids before it, since some decoders treat the first token differently.
        before = self.tokenizer.decode(self.settled)
        return self.tokenizer.decode(self.settled + self.waiting)[len(before) :]
