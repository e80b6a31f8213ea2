"""Documents to token ids, by what they are: texts, each with the token that ends it; conversations, of which a part is
learned; pairs of them, the chosen one before the rejected one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from smolforge.config import Data
from smolforge.data.prepare.conversations import (
    conversation_document,
    is_empty,
    messages_of,
    pair_of,
    preference_document,
)
from smolforge.data.prepare.documents import Document, text_document
from smolforge.data.sources.types import Row
from smolforge.errors import InvalidFile, SettingError
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.chat import Turns
from smolforge.tokenizer.chat_encoding import Learned, encode_turns

Talk = tuple[list[dict[str, Any]], int]


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
    ends: bool = True
    """Whether the document ends with it."""


@dataclass(frozen=True)
class Form:
    """What data.format chooses."""

    document: Callable[[Row, Data], Document]
    words: Callable[[Document], str]
    """What a tokenizer would be trained on."""
    encode: Callable[[Tokenizer, Sequence[Document]], list[list[Encoded]]]
    """What each document becomes; nothing where there is nothing to learn in it."""
    fitting: Callable[[Tokenizer, list[Encoded], float], list[Encoded]]
    """What of that is put where there is room for so many ids."""
    divisible: bool
    """Whether a document may be held out in part."""


def encode_texts(tokenizer: Tokenizer, texts: Sequence[Document]) -> list[list[Encoded]]:
    encoded = iter(tokenizer.encode_batch([document.text for document in texts if document.ids is None]))
    return [[encoded_text(tokenizer, each, next(encoded) if each.ids is None else None)] for each in texts]


def encoded_text(tokenizer: Tokenizer, document: Document, ids: list[int] | None) -> Encoded:
    """With its sizes, and the token that ends it; one that is tokenised already as it is."""
    if ids is None:
        assert document.ids is not None
        if (most := int(document.ids.max(initial=0))) >= len(tokenizer):
            raise InvalidFile(f"{document.place} has id {most}, and the tokenizer has {len(tokenizer):,}; name its own")
        text_ids = document.ids[document.ids != tokenizer.eos_id].tolist()
        return Encoded(document.ids.tolist(), len(tokenizer.decode(text_ids).encode()))
    text = document.text
    end = [tokenizer.eos_id] if document.ends else []
    return Encoded(ids + end, len(text.encode()), tokenizer.lost_bytes(text), ends=document.ends)


def beginning(tokenizer: Tokenizer, text: list[Encoded], room: float) -> list[Encoded]:
    """As much of a text as fits, and its end."""
    (whole,) = text
    if len(whole.ids) + 2 * (not whole.ends) <= room:  # what a piece leaves has room for a token and the end
        return text
    ids = whole.ids[: max(0, int(room) - 1)]
    part = whole._replace(ids=[*ids, tokenizer.eos_id], text_bytes=len(tokenizer.decode(ids).encode()), ends=True)
    return [part] if ids else []


def encode_conversations(tokenizer: Tokenizer, found: Sequence[Document]) -> list[list[Encoded]]:
    """Raises InvalidFile, naming the line, for a conversation that the chat template refuses."""
    said = [messages_of(document) for document in found]
    return encode_talks(tokenizer, [(document, [each]) for document, each in zip(found, said, strict=True)])


def encode_pairs(tokenizer: Tokenizer, found: Sequence[Document]) -> list[list[Encoded]]:
    """Of both conversations of a pair the last message is learned. Nothing is left of a pair in which nothing can be
    preferred: an answer is empty, or the template writes both alike. Raises as `encode_conversations`.
    """
    both = [[(messages, len(messages) - 1) for messages in pair_of(document)] for document in found]
    encoded = encode_talks(tokenizer, list(zip(found, both, strict=True)))
    return [
        [] if chosen.ids == rejected.ids or any(is_empty(messages[-1]) for messages, _ in talks) else [chosen, rejected]
        for talks, (chosen, rejected) in zip(both, encoded, strict=True)
    ]


def encode_talks(tokenizer: Tokenizer, found: Sequence[tuple[Document, list[Talk]]]) -> list[list[Encoded]]:
    """The conversations of each document, which are messages and the number of the first to learn."""
    assert tokenizer.template is not None, "prepare made it a chat tokenizer"
    turns = []
    for document, talks in found:
        try:
            turns += [tokenizer.template.render_turns(*talk) for talk in talks]
        except (SettingError, InvalidFile) as error:
            raise InvalidFile(f"{document.place}: {error}") from None
    encoded = zip(turns, encode_turns(tokenizer, turns), strict=True)
    of_each = [[encoded_talk(tokenizer, *next(encoded)) for _ in talks] for _, talks in found]
    return [[each for each in parts if each is not None] for parts in of_each]


def encoded_talk(tokenizer: Tokenizer, turns: Turns, there: Learned) -> Encoded | None:
    """With its sizes; None where nothing is learned."""
    text = turns.text.translate(turns.back)
    said = [turns.text[start:stop].rpartition(tokenizer.eos_token)[0] for start, stop in turns.spans]
    learned_bytes = sum(len(part.translate(turns.back).encode()) for part in said)
    whole = Encoded(there.ids, len(text.encode()), tokenizer.lost_bytes(text), there.learned, learned_bytes)
    return whole if turns.spans else None


def all_or_nothing(_: Tokenizer, whole: list[Encoded], room: float) -> list[Encoded]:
    return whole if sum(len(each.ids) for each in whole) <= room else []


def said_in(document: Document) -> str:
    """What all say in a conversation, for a tokenizer to learn from."""
    return "\n".join(message.get("content", "") for message in messages_of(document)[0])


def said_in_pair(document: Document) -> str:
    """The same of a pair."""
    chosen, rejected = pair_of(document)
    return "\n".join(message.get("content", "") for message in [*chosen, rejected[-1]])


FORMS = {
    "text": Form(text_document, lambda document: document.text, encode_texts, beginning, divisible=True),
    "chat": Form(conversation_document, said_in, encode_conversations, all_or_nothing, divisible=False),
    "pairs": Form(preference_document, said_in_pair, encode_pairs, all_or_nothing, divisible=False),
}
