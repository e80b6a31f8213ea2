"""Documents to token ids, by what they are: texts, each with the token that ends it; conversations, of which a part is
learned.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from smolforge.config import Data
from smolforge.data.conversations import conversations, messages_of
from smolforge.data.documents import Document, documents
from smolforge.errors import InvalidFile, SettingError
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.turns import encode_turns


class Encoded(NamedTuple):
    """A document as it stands in a shard."""

    ids: list[int]
    text_bytes: int
    """Of UTF-8."""
    lost: bytes = b""
    """What the tokenizer has no symbol for."""
    learned: list[bool] | None = None
    """Of each id, in a conversation; of a text all are."""
    learned_bytes: int = 0


@dataclass(frozen=True)
class Form:
    """What data.format chooses."""

    read: Callable[[str, Data], Iterator[Document]]
    words: Callable[[Document], str]
    """What a tokenizer would be trained on."""
    encode: Callable[[Tokenizer, Sequence[Document]], list[Encoded | None]]
    """None stands for a document with nothing to learn in it."""
    fitting: Callable[[Tokenizer, Encoded, float], Encoded | None]
    """What of a document is put where there is room for so many ids."""
    divisible: bool
    """Whether a document may be held out in part."""


def encode_texts(tokenizer: Tokenizer, texts: Sequence[Document]) -> list[Encoded | None]:
    encoded = tokenizer.encode_batch([document.text for document in texts])
    return [
        Encoded([*ids, tokenizer.eos_id], len(document.text.encode()), tokenizer.lost_bytes(document.text))
        for document, ids in zip(texts, encoded, strict=True)
    ]


def beginning(tokenizer: Tokenizer, whole: Encoded, room: float) -> Encoded | None:
    """As much of a text as fits, and its end."""
    if len(whole.ids) <= room:
        return whole
    ids = whole.ids[: max(0, int(room) - 1)]
    return whole._replace(ids=[*ids, tokenizer.eos_id], text_bytes=len(tokenizer.decode(ids).encode())) if ids else None


def encode_conversations(tokenizer: Tokenizer, found: Sequence[Document]) -> list[Encoded | None]:
    """Raises InvalidFile, naming the line, for a conversation that the chat template refuses."""
    assert tokenizer.template is not None, "prepare made it a chat tokenizer"
    turns = []
    for document in found:
        try:
            turns.append(tokenizer.template.render_turns(*messages_of(document)))
        except (SettingError, InvalidFile) as error:
            raise InvalidFile(f"{document.place}: {error}") from None
    encoded: list[Encoded | None] = []
    for each, (ids, learned) in zip(turns, encode_turns(tokenizer, turns), strict=True):
        text = each.text.translate(each.back)
        said = [
            each.text[start:stop].rpartition(tokenizer.eos_token)[0].translate(each.back) for start, stop in each.spans
        ]
        sizes = len(text.encode()), sum(len(part.encode()) for part in said)
        lost = tokenizer.lost_bytes(text)
        encoded.append(Encoded(ids, sizes[0], lost, learned, sizes[1]) if each.spans else None)
    return encoded


def all_or_nothing(_: Tokenizer, whole: Encoded, room: float) -> Encoded | None:
    return whole if len(whole.ids) <= room else None


def said_in(document: Document) -> str:
    """What all say in a conversation, for a tokenizer to learn from."""
    return "\n".join(message["content"] for message in messages_of(document)[0])


FORMS = {
    "text": Form(documents, lambda document: document.text, encode_texts, beginning, divisible=True),
    "chat": Form(conversations, said_in, encode_conversations, all_or_nothing, divisible=False),
}
