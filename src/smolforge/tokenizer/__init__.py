"""Text to token ids and back.

A tokenizer is Hugging Face's `tokenizer.json`, run by the tokenizers library. User text never yields a
special token: `<|endoftext|>` inside a document is encoded as the characters it is made of.
"""

import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from smolforge.errors import ConfigError, InvalidFileError
from smolforge.tokenizer.chat import ChatTemplate, SpecialTokens
from smolforge.tokenizer.files import (
    FILES,
    NAMED_TOKENS,
    bos_ids_of,
    check_growth,
    checked_settings,
    parse_backend,
    read_settings,
    read_utf8_file,
)

__all__ = ["END_OF_TEXT", "FILES", "SPECIAL_TOKENS", "IncrementalDecoder", "Tokenizer", "split_at_lines"]

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
CHARACTERS_PER_BATCH = 2 << 20
"""Characters that are encoded together."""
PART_CHARACTERS = 1 << 20
MAX_VOCAB_SIZE = 1 << 20  # ids to learn, for all of which memory is set aside at once
_LINE_END = re.compile(r"\n(?:(?<=\S\n)(?=\S)|(?=[\n ][!-/:-~]))|\r(?=\n[!-/:-~])")


class Tokenizer:
    """One tokenizer.json and the settings beside it."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any] | None = None) -> None:
        self.backend = backend
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()  # a file may ask for both, and lose text
        self.backend.no_padding()
        self.settings = checked_settings(settings or {})
        self.eos_token = self.named_token("eos_token") or END_OF_TEXT
        eos_id = backend.token_to_id(self.eos_token)
        if eos_id is None:
            raise InvalidFileError(
                f"the tokenizer has no end-of-text token {self.eos_token!r}; "
                "name the right one as eos_token in its tokenizer_config.json"
            )
        self.eos_id: int = eos_id
        self.extra_eos_ids: tuple[int, ...] = ()
        """Other ids that end an answer, which the model's files name and tokenizer_config.json cannot."""
        self.special = SpecialTokens(backend.get_added_tokens_decoder())
        pipeline = json.loads(backend.to_str())
        check_growth(pipeline["normalizer"])
        self.bos_ids = bos_ids_of(pipeline["post_processor"])
        """The id that is added before a text of its own, as Transformers adds it; most tokenizers add none."""
        pattern = json.dumps(pipeline["pre_tokenizer"])
        self._bytes_have_symbols = '"ByteLevel"' in pattern and pipeline["model"]["type"] == "BPE"
        self._marks_start = '"prepend_scheme": "first"' in pattern
        self.byte_level = pipeline["normalizer"] is None and self._bytes_have_symbols and '"Split"' not in pattern
        self.template = self._chat_template()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json, or the folder that holds one.

        Raises InvalidFileError where there is none, or it is broken.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InvalidFileError(f"there is no tokenizer.json at {path}; name a local folder or file that has one")
        backend = parse_backend(read_utf8_file(file), f"{file} is not a tokenizer")
        settings = read_settings(file.parent)
        template = file.with_name("chat_template.jinja")
        if template.is_file():
            settings = {**settings, "chat_template": read_utf8_file(template)}
        return cls(backend, settings)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a byte-level BPE with SmolLM2's pipeline: digits alone, then GPT-2's word pattern.

        All 256 bytes are in the vocabulary, so any text survives the round trip (the published
        tokenizer lacks 21 of them). A short text may yield fewer than `vocab_size` ids.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        smallest = len(alphabet) + len(SPECIAL_TOKENS)
        if not smallest <= vocab_size <= MAX_VOCAB_SIZE:
            allowed = f"at least {smallest} and at most {MAX_VOCAB_SIZE:,}"
            raise ConfigError(f"a byte-level tokenizer needs a vocab_size of {allowed}, not {vocab_size}")
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
        backend.train_from_iterator(chain.from_iterable(map(split_at_lines, texts)), trainer)
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

    @functools.cached_property
    def largest_id(self) -> int:
        """What a model's vocabulary must reach beyond."""
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer; the first, `eos_id`, is the one that ends documents."""
        return (self.eos_id, *(number for number in self.extra_eos_ids if number != self.eos_id))

    def with_eos_ids(self, ids: Iterable[int]) -> "Tokenizer":
        """Return this tokenizer with more ids that end an answer. This one stays as it is."""
        other = copy.copy(self)
        other.extra_eos_ids = tuple(dict.fromkeys([*self.extra_eos_ids, *ids]))
        return other

    @property
    def bos_id(self) -> int | None:
        """The id that the settings name so. Only `bos_ids` are added, and only by `encode_prompt`."""
        return self._named_id("bos_token")

    @property
    def prefix_id(self) -> int:
        """What a text of its own is predicted behind."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def start_id(self) -> int:
        """The id that comes before a text: its BOS, or the end of the text before it."""
        return self.bos_ids[0] if self.bos_ids else self.eos_id

    @property
    def border_ids(self) -> list[int]:
        """The ids between the texts of a corpus, which are no text."""
        return [*self.bos_ids, self.eos_id]

    @property
    def pad_id(self) -> int | None:
        """The id other programs fill rows up with."""
        return self._named_id("pad_token")

    def _named_id(self, key: str) -> int | None:
        token = self.named_token(key)
        return None if token is None else self.backend.token_to_id(token)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the ids of a text."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @functools.cached_property
    def missing_bytes(self) -> bytes:
        """The bytes this vocabulary has no symbol for: they vanish from a text without a word."""
        if not self._bytes_have_symbols:
            return b""
        symbols = sorted(byte_symbols().items())
        return bytes(byte for byte, symbol in symbols if self.backend.token_to_id(symbol) is None)

    def lost_bytes(self, text: str) -> bytes:
        """What `encode` would lose of a text, in order; nothing, of most texts."""
        return text.encode("utf-8", "surrogatepass").translate(None, self._known_bytes) if self.missing_bytes else b""

    @functools.cached_property
    def _known_bytes(self) -> bytes:
        return bytes(set(range(256)) - set(self.missing_bytes))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text as a model is given it: behind BOS, where this tokenizer adds one.

        `parse_special` reads special tokens that the text spells, of which the first may be its BOS already.
        """
        return self.add_bos(self.encode_with_special_tokens(text) if parse_special else self.encode(text))

    def add_bos(self, ids: list[int]) -> list[int]:
        """Return the ids behind BOS, where this tokenizer adds one and they do not begin with it."""
        return ids if ids[: len(self.bos_ids)] == self.bos_ids else self.bos_ids + ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, using all cores."""
        parts = [list(split_at_lines(text)) if self.byte_level else [text] for text in texts]
        ids = self._encode_parts(list(chain.from_iterable(parts)))
        return [next(ids) if len(text) == 1 else list(chain.from_iterable(islice(ids, len(text)))) for text in parts]

    def _encode_parts(self, parts: Sequence[str]) -> Iterator[list[int]]:
        """Some at a time: what the library makes of a text is a hundred times as large, until its ids are taken out."""
        ends = accumulate(map(len, parts))
        for _, group in groupby(
            zip(parts, ends, strict=True), lambda part_and_end: part_and_end[1] // CHARACTERS_PER_BATCH
        ):
            try:
                encodings = self.backend.encode_batch_fast([part for part, _ in group], add_special_tokens=False)
            except Exception as error:  # the library raises bare Exception
                raise InvalidFileError(
                    f"this tokenizer cannot encode the text: {' '.join(str(error).split())}"
                ) from None
            yield from (encoding.ids for encoding in encodings)

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Token ids of a text whose special tokens are meant: never of one that a user wrote."""
        return self._encode_trusted(text, {})

    def chat(self, messages: Any, add_generation_prompt: bool = True, **extra: Any) -> list[int]:
        """Token ids of a conversation, a list of {"role", "content"}; every special token is the template's own.

        `add_generation_prompt` opens the assistant's turn; `extra` are more variables for the template.
        """
        return self._encode_trusted(*self._require_template().render_escaped(messages, add_generation_prompt, **extra))

    def render_chat(self, messages: Any, add_generation_prompt: bool = True, **extra: Any) -> str:
        """The conversation as the model is shown it, as text."""
        return self._require_template().render(messages, add_generation_prompt, **extra)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are spelled out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def with_special_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """A tokenizer that has these special tokens too, at the next ids. This one stays as it is."""
        backend, new_tokens = tokenizers.Tokenizer.from_str(self.backend.to_str()), []
        for token in dict.fromkeys(tokens):
            if not token.strip() or (token not in self.special.by_text and backend.token_to_id(token) is not None):
                raise ConfigError(
                    f"{token!r} cannot become a special token: it is empty, or a token of ordinary text; choose another"
                )
            if token not in self.special.by_text:
                new_tokens.append(tokenizers.AddedToken(token, special=True, normalized=False))
        backend.add_special_tokens(new_tokens)
        settings = dict(self.settings)
        if "added_tokens_decoder" in settings:  # where Transformers looks first
            added = {str(backend.token_to_id(token.content)): token.__getstate__() for token in new_tokens}
            settings["added_tokens_decoder"] = {**settings["added_tokens_decoder"], **added}
        return Tokenizer(backend, settings).with_eos_ids(self.extra_eos_ids)

    def save(self, folder: Path) -> None:
        """Write the files Transformers reads, 4 and 5.

        The chat template has a file of its own, as now usual, and stays in the settings for readers of before.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), "utf-8", newline="\n")
        # The class that runs tokenizer.json as it is; as GPT2Tokenizer, Transformers 5 forgets that digits stand alone.
        # In Transformers 4 that class makes token_type_ids unless told not to, and generate refuses them.
        inputs = ["input_ids", "attention_mask"]
        settings = {"eos_token": self.eos_token, "model_input_names": inputs, **self.settings}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        added = {"add_bos_token": bool(self.bos_ids), "add_eos_token": False}  # tokenizer.json decides; both agree
        settings |= {key: value for key, value in added.items() if key in settings}
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8", newline="\n"
        )
        template = folder / "chat_template.jinja"
        template.unlink(missing_ok=True)  # of what was here before
        if isinstance(self.settings.get("chat_template"), str):
            template.write_text(self.settings["chat_template"], "utf-8", newline="\n")

    def _encode_trusted(self, text: str, unescape_table: dict[int, str]) -> list[int]:
        """Return the ids of a text and its special tokens; `unescape_table` is applied to what is between them."""
        pieces = self.special.split(text)
        texts = [piece.translate(unescape_table) for piece in pieces if isinstance(piece, str)]
        rows = iter(self.encode_batch(texts[:1]) + self.continuation.encode_batch(texts[1:]))
        return [token for piece in pieces for token in ([piece] if isinstance(piece, int) else next(rows))]

    @functools.cached_property
    def continuation(self) -> "Tokenizer":
        """For text behind a special token: one that does not mark a beginning, where this one does."""
        if not self._marks_start:
            return self
        pipeline = self.backend.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        return Tokenizer(tokenizers.Tokenizer.from_str(pipeline), self.settings)

    def _chat_template(self) -> ChatTemplate | None:
        """The settings' template, of several the one called default."""
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not template:
            return None
        named_tokens = {key: token for key in NAMED_TOKENS if (token := self.named_token(key)) is not None}
        return ChatTemplate(template, list(self.special.by_text), {"eos_token": self.eos_token, **named_tokens})

    def _require_template(self) -> ChatTemplate:
        if self.template is None:
            raise ConfigError(
                "this tokenizer has no chat template, so its model is a base model that was not taught to chat; "
                "use an instruct model such as HuggingFaceTB/SmolLM2-135M-Instruct, or set chat_template in its "
                "tokenizer_config.json"
            )
        return self.template

    def named_token(self, key: str) -> str | None:
        """The text of the token that the settings name so (bos_token, ...), if they do."""
        token = self.settings.get(key)
        return token["content"] if isinstance(token, dict) else token


class IncrementalDecoder:
    """Ids in one at a time, text out as soon as its characters are whole.

    The joined pieces equal `decode` of all ids; a character cut in the middle waits for its rest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.context: list[int] = []  # the last ids already given out, kept as context
        self.pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that became whole with this id, perhaps none."""
        self.pending.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self.context, self.pending = self.pending, []
        return text

    def finish(self) -> str:
        """What is still waiting, broken as it may be."""
        text = self._new_text() if self.pending else ""
        self.context, self.pending = self.pending, []
        return text

    def _new_text(self) -> str:
        # Decoded behind the ids before it, since some decoders treat the first token differently.
        before = self.tokenizer.decode(self.context)
        return self.tokenizer.decode(self.context + self.pending)[len(before) :]


def byte_symbols() -> dict[int, str]:
    """The visible character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    invisible = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + index) for index, byte in enumerate(invisible)}


def split_at_lines(text: str) -> Iterator[str]:
    """Parts of about a million characters, so that one long file uses all cores and little memory.

    GPT-2's word pattern takes a single newline between visible characters by itself, so a cut behind it
    changes no token. Of more white space it takes the last apart, alone or with the word that follows, so a cut before
    that changes none either. (Elsewhere it would; and digits stand alone, so before one nothing is taken apart.)
    """
    start = 0
    while len(text) - start > PART_CHARACTERS:
        cut = _LINE_END.search(text, start + PART_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]
