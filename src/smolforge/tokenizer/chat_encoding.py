"""Encode conversations to ids, and mark those that a model is to learn.

    <|im_start|>user  Hi  <|im_end|>  |n| <|im_start|>assistant  |n| | Hello!  <|im_end|>  |n| <|im_start|>user ...
                                                                      learned  learned   not

Learned is what the model will have to say: everything between the prompt that asks for a turn and the special token
that ends it, that token included, for a model that never learned to give it never stops. What the template writes
after that token, and before the turn, nobody will ask the model for.
"""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from smolforge.errors import ConfigError, InvalidFileError
from smolforge.tokenizer import SPECIAL_TOKENS, Tokenizer
from smolforge.tokenizer.chat import CHATML, RenderedTurns

IM_START, IM_END = SPECIAL_TOKENS[1:]
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class EncodedConversation(NamedTuple):
    """One conversation as ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]
    """Of each id."""


def chat_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same words with a chat template, whose end of a turn is what ends a text.

    A tokenizer without a template gets SmolLM2's, and the roles its special tokens have there. Raises ConfigError
    where it lacks those tokens, InvalidFileError for a template whose turns no special token ends.
    """
    settings = dict(tokenizer.settings)
    if tokenizer.template is None:
        missing = [token for token in (IM_START, IM_END) if token not in tokenizer.special.by_text]
        if missing:
            raise ConfigError(
                f"the tokenizer has no chat template, and no {' and no '.join(missing)} for SmolLM2's; "
                f"--special-tokens '{IM_START},{IM_END}' adds what that needs"
            )
        settings |= {"chat_template": CHATML, "bos_token": IM_START, "eos_token": IM_END, "pad_token": IM_END}
    else:
        turns = tokenizer.template.render_turns(PROBE)
        closing = _special_token_ids(tokenizer, turns, 0)
        if not closing:
            raise InvalidFileError(_no_end_of_turn(tokenizer))
        settings["eos_token"] = tokenizer.backend.id_to_token(closing[-1])
    return Tokenizer(tokenizer.backend, settings).with_eos_ids(tokenizer.extra_eos_ids)


def encode_turns(tokenizer: Tokenizer, conversations: Sequence[RenderedTurns]) -> list[EncodedConversation]:
    """Ids of each conversation, using all cores. The tokenizer is one that `chat_tokenizer` made.

    A turn is encoded by itself, as the model will give it: no token reaches from the prompt into it, as one could
    where a turn begins with white space. Raises InvalidFileError for a turn that no end of turn ends.
    """
    split = [[tokenizer.special.split(part) for part in _split_at_turns(turns)] for turns in conversations]
    texts = [
        [piece.translate(turns.unescape_table) for piece in chain(*parts) if isinstance(piece, str)]
        for turns, parts in zip(conversations, split, strict=True)
    ]
    first = tokenizer.encode_batch([first_text for first_text, *_ in texts])
    later_ids = iter(tokenizer.continuation.encode_batch([text for _, *later_texts in texts for text in later_texts]))
    encoded = []
    for turns, parts, first_ids in zip(conversations, split, first, strict=True):
        text_ids = chain([first_ids], later_ids)
        ids: list[int] = []
        learned: list[bool] = []
        for number, pieces in enumerate(parts):
            closing = _special_token_ids(tokenizer, turns, number - 1) if number else []
            if number and closing[-1:] != [tokenizer.eos_id]:
                raise InvalidFileError(_no_end_of_turn(tokenizer))
            num_left = len(closing)
            for piece in pieces:
                piece_ids = [piece] if isinstance(piece, int) else next(text_ids)
                ids += piece_ids
                learned += [num_left > 0] * len(piece_ids)
                num_left -= isinstance(piece, int)
        encoded.append(EncodedConversation(ids, learned))
    return encoded


def _split_at_turns(turns: RenderedTurns) -> list[str]:
    """Split the text where each turn to learn starts."""
    borders = [0, *(start for start, _ in turns.spans), len(turns.text)]
    return [turns.text[start:stop] for start, stop in pairwise(borders)]


def _special_token_ids(tokenizer: Tokenizer, turns: RenderedTurns, number: int) -> list[int]:
    """Return the special tokens in a turn, of which the last ends it."""
    start, stop = turns.spans[number]
    return [piece for piece in tokenizer.special.split(turns.text[start:stop]) if isinstance(piece, int)]


def _no_end_of_turn(tokenizer: Tokenizer) -> str:
    source = "" if tokenizer.template is None else " ".join(tokenizer.template.source.split())
    return (
        f"the chat template ({source[:60]}...) does not end every assistant's turn with the same special token, "
        "so a model that learns from it would not know when to stop; use one that does"
    )
