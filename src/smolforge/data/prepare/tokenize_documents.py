"""Documents to token ids, by what they are: texts, each with the token that ends it; conversations, of which a part is
learned; pairs of them, the chosen one before the rejected one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from smolforge.config import Data
from smolforge.data.prepare.conversations import (
    conversation_document,
    is_empty,
    messages_of,
    pair_of,
    preference_document,
)
from smolforge.data.prepare.documents import Document, text_document
from smolforge.data.sources.types import SourceRow
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.chat import RenderedTurns
from smolforge.tokenizer.chat_encoding import EncodedConversation, encode_turns

Conversation = tuple[list[dict[str, Any]], int]


class EncodedDocument(NamedTuple):
    """A document as it stands in a shard."""

    ids: list[int]
    text_bytes: int
    """Of UTF-8."""
    lost_bytes: bytes = b""
    """What the tokenizer has no symbol for."""
    learned: list[bool] | None = None
    """Of each id, in a conversation; of a text all are."""
    learned_bytes: int = 0
    ends: bool = True
    """Whether the document ends with it."""


@dataclass(frozen=True)
class DataFormat:
    """What data.format chooses."""

    parse: Callable[[SourceRow, Data], Document]
    training_text: Callable[[Document], str]
    """What a tokenizer would be trained on."""
    encode: Callable[[Tokenizer, Sequence[Document]], list[list[EncodedDocument]]]
    """What each document becomes; nothing where there is nothing to learn in it."""
    truncate: Callable[[Tokenizer, list[EncodedDocument], float], list[EncodedDocument]]
    """As much of an encoded document as fits into a number of tokens."""
    divisible: bool
    """Whether a document may be held out in part."""


def encode_texts(tokenizer: Tokenizer, texts: Sequence[Document]) -> list[list[EncodedDocument]]:
    encoded = iter(tokenizer.encode_batch([document.text for document in texts if document.ids is None]))
    return [[encode_text(tokenizer, document, next(encoded) if document.ids is None else None)] for document in texts]


def encode_text(tokenizer: Tokenizer, document: Document, ids: list[int] | None) -> EncodedDocument:
    """Return a text encoded, with its sizes, its eos token and BOS if it has one; one that is tokenized, as it is."""
    if ids is None:
        assert document.ids is not None
        if (largest_id := int(document.ids.max(initial=0))) >= len(tokenizer):
            raise InvalidFileError(
                f"{document.location} has id {largest_id}, and the tokenizer has {len(tokenizer):,}; name its own"
            )
        text_ids = document.ids[~np.isin(document.ids, tokenizer.border_ids)].tolist()
        return EncodedDocument(document.ids.tolist(), len(tokenizer.decode(text_ids).encode()))
    text = document.text
    ids = (tokenizer.bos_ids if document.starts else []) + ids + ([tokenizer.eos_id] if document.ends else [])
    return EncodedDocument(ids, len(text.encode()), tokenizer.lost_bytes(text), ends=document.ends)


def truncate_text(tokenizer: Tokenizer, text: list[EncodedDocument], max_tokens: float) -> list[EncodedDocument]:
    """Return as much of a text as fits into `max_tokens`, and its eos token."""
    (document,) = text
    # what a piece leaves has room for a token and the end
    if len(document.ids) + 2 * (not document.ends) <= max_tokens:
        return text
    ids = document.ids[: max(0, int(max_tokens) - 1)]
    text_ids = [number for number in ids if number not in tokenizer.border_ids]
    text_bytes = len(tokenizer.decode(text_ids).encode())
    part = document._replace(ids=[*ids, tokenizer.eos_id], text_bytes=text_bytes, ends=True)
    return [part] if text_ids else []


def encode_conversations(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[list[EncodedDocument]]:
    """Raises InvalidFileError, naming the line, for a conversation that the chat template refuses."""
    conversations = [messages_of(document) for document in documents]
    return encode_by_document(
        tokenizer, [(document, [conversation]) for document, conversation in zip(documents, conversations, strict=True)]
    )


def encode_pairs(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[list[EncodedDocument]]:
    """Of both conversations of a pair the last message is learned. Nothing is left of a pair in which nothing can be
    preferred: an answer is empty, or the template writes both alike. Raises as `encode_conversations`.
    """
    pairs = [[(messages, len(messages) - 1) for messages in pair_of(document)] for document in documents]
    encoded = encode_by_document(tokenizer, list(zip(documents, pairs, strict=True)))
    return [
        []
        if chosen.ids == rejected.ids or any(is_empty(messages[-1]) for messages, _ in conversations)
        else [chosen, rejected]
        for conversations, (chosen, rejected) in zip(pairs, encoded, strict=True)
    ]


def encode_by_document(
    tokenizer: Tokenizer, items: Sequence[tuple[Document, list[Conversation]]]
) -> list[list[EncodedDocument]]:
    """Encode the conversations of each document: messages, and the number of the first to learn."""
    assert tokenizer.template is not None, "prepare made it a chat tokenizer"
    turns = []
    for document, conversations in items:
        try:
            turns += [tokenizer.template.render_turns(*talk) for talk in conversations]
        except (ConfigError, InvalidFileError) as error:
            raise InvalidFileError(f"{document.location}: {error}") from None
    encoded = zip(turns, encode_turns(tokenizer, turns), strict=True)
    parts_by_document = [
        [encode_conversation(tokenizer, *next(encoded)) for _ in conversations] for _, conversations in items
    ]
    return [[part for part in parts if part is not None] for parts in parts_by_document]


def encode_conversation(
    tokenizer: Tokenizer, turns: RenderedTurns, encoded: EncodedConversation
) -> EncodedDocument | None:
    """Return a conversation with its sizes, or None where nothing is learned."""
    text = turns.text.translate(turns.unescape_table)
    answers = [turns.text[start:stop].rpartition(tokenizer.eos_token)[0] for start, stop in turns.spans]
    learned_bytes = sum(len(part.translate(turns.unescape_table).encode()) for part in answers)
    document = EncodedDocument(
        encoded.ids, len(text.encode()), tokenizer.lost_bytes(text), encoded.learned, learned_bytes
    )
    return document if turns.spans else None


def all_or_nothing(_: Tokenizer, parts: list[EncodedDocument], max_tokens: float) -> list[EncodedDocument]:
    return parts if sum(len(part.ids) for part in parts) <= max_tokens else []


def conversation_text(document: Document) -> str:
    """Return the contents of all messages, to train a tokenizer on."""
    return "\n".join(message.get("content", "") for message in messages_of(document)[0])


def pair_text(document: Document) -> str:
    """Return the contents of all messages of a pair."""
    chosen, rejected = pair_of(document)
    return "\n".join(message.get("content", "") for message in [*chosen, rejected[-1]])


DATA_FORMATS = {
    "text": DataFormat(text_document, lambda document: document.text, encode_texts, truncate_text, divisible=True),
    "chat": DataFormat(conversation_document, conversation_text, encode_conversations, all_or_nothing, divisible=False),
    "pairs": DataFormat(preference_document, pair_text, encode_pairs, all_or_nothing, divisible=False),
}
