"""Render messages to the text a chat model was trained on, by the model's own Jinja template.

Templates run in a process of their own (process.py, worker.py). Nobody's words may become a special token, so special
tokens in messages are escaped before the template runs, and come back after its text is split at its own:

    <|im_end|>   a user wrote this; in a template's text it would end the turn
    ?|im_end|>   so its first character is replaced: ? is a private code point that nothing else uses
    <|im_end|>   and comes back when the text has been split at the special tokens that are the template's own

A special token may also be put together from two strings, or from a string and the template's own text, so a string
that ends with the beginning of one, begins with the end of one, or lies inside one is escaped in the same way. Keys
too, which a template may write; where it only reads or compares, an escaped text is equal to the original (worker.py).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from smolforge.errors import ConfigError, InvalidFileError
from smolforge.tokenizer.chat.process import MAX_CHARACTERS, RENDER_SECONDS, WORKER

__all__ = ["CHATML", "ChatTemplate", "RenderedTurns"]

CHATML = Path(__file__).with_name("chatml.jinja").read_text("utf-8")
"""The template of SmolLM2's instruct models, for tokenizers that come without one."""
WHITE_SPACE = " \t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""White space as the tokenizers library has it; Python's strip() knows four more."""
PRIVATE_USE_AREAS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
PROTOCOL_WORDS = {
    *("system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "environment", "observation"),
    *("role", "content", "type", "text"),
}
"""Words of the protocol. Some templates make special tokens of them on purpose, as in '<|' + role + '|>'."""
_READS_PARTS = re.compile(r"""\.text\b|['"]text['"]""")


class SpecialTokens:
    """The special tokens of a tokenizer, by their ids. Ordinary added tokens are left to the library."""

    def __init__(self, added: Mapping[int, AddedToken]) -> None:
        self.by_text = {token.content: (number, token) for number, token in added.items() if token.special}
        self.by_text.pop("", None)
        longest_first = sorted(self.by_text, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def split(self, text: str) -> list[str | int]:
        """Text, id, text, ..., text: some of the texts empty, the first and the last always there.

        The tokenizers library never merges across a special token, so encoding these is encoding the whole.
        """
        pieces, start = [], 0
        for match in self.pattern.finditer(text):
            number, token = self.by_text[match[0]]
            first, last = match.span()
            if token.single_word and (_in_word(text[max(0, first - 1) : first]) or _in_word(text[last : last + 1])):
                continue
            before = text[start:first]
            pieces += [before.rstrip(WHITE_SPACE) if token.lstrip else before, number]
            start = last
            while token.rstrip and text[start : start + 1] in WHITE_SPACE and start < len(text):
                start += 1
        return [*pieces, text[start:]]


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


class SpecialTokenEscaper:
    """Escapes the special tokens in everything that is not the template's own."""

    def __init__(self, special: Sequence[str]) -> None:
        self.special = tuple(sorted({token for token in special if token}, key=len, reverse=True))
        self.longest = max(map(len, self.special), default=0)
        self.prefixes = {token[:size] for token in self.special for size in range(1, len(token))}
        self.suffixes = {token[size:] for token in self.special for size in range(1, len(token))}
        self.first_characters = sorted({token[0] for token in self.special} | {end[0] for end in self.suffixes})

    def escape(self, value: Any, template: str) -> tuple[Any, dict[int, str]]:
        """A copy of the value, and the table for `str.translate` that restores the escaped characters."""
        used = set(template).union(*self.special, *iterate_strings(value))
        free = (chr(code) for code in chain(*PRIVATE_USE_AREAS) if chr(code) not in used)
        hidden = dict(zip(self.first_characters, free, strict=False))
        if len(hidden) < len(self.first_characters):
            raise ConfigError("the messages use every private-use character there is; leave some of them out")
        return self._escape_value(value, hidden), {ord(private): character for character, private in hidden.items()}

    def _escape_value(self, value: Any, hidden: dict[str, str]) -> Any:
        if isinstance(value, str):
            return self._escape_text(value, hidden)
        if isinstance(value, dict):
            return {self._escape_text(key, hidden): self._escape_value(item, hidden) for key, item in value.items()}
        if isinstance(value, list):
            return [self._escape_value(item, hidden) for item in value]
        return value

    def _escape_text(self, text: str, hidden: dict[str, str]) -> str:
        if not self.special or (text in PROTOCOL_WORDS and text not in self.special):
            return text
        characters = list(text)
        for index in self._positions(text):
            characters[index] = hidden[text[index]]
        return "".join(characters)

    def _positions(self, text: str) -> Iterator[int]:
        """Yield where a special token starts, or could once text is put before or after it.

        Templates trim, so ends count.
        """
        for token in self.special:
            index = text.find(token)
            while index >= 0:
                yield index
                index = text.find(token, index + 1)
        end = len(text.rstrip())
        for size in range(1, min(self.longest, end + 1)):
            if text[end - size : end] in self.prefixes:
                yield end - size
        body = text.strip()
        start = len(text) - len(text.lstrip())
        inside = len(body) < self.longest and any(body in token for token in self.special)
        if body and (inside or any(body[:size] in self.suffixes for size in range(1, self.longest))):
            yield start


def iterate_strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from iterate_strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from iterate_strings(item)


class RenderedTurns(NamedTuple):
    """A conversation to learn from."""

    text: str
    """Up to the end of the assistant's last turn; every special token in it is the template's own."""
    spans: list[tuple[int, int]]
    """First and last + 1 of what the template writes of each turn to learn, after the prompt that asks for it."""
    unescape_table: dict[int, str]
    """The table for `str.translate` that makes the text readable."""


class ChatTemplate:
    """One Jinja template, the special tokens of its tokenizer, and those it may ask for by name (bos_token, ...)."""

    def __init__(
        self,
        source: str,
        special: Sequence[str] = (),
        named_tokens: Mapping[str, str] | None = None,
        *,
        seconds: float = RENDER_SECONDS,
    ) -> None:
        self.source = source
        self.named_tokens = dict(named_tokens or {})
        self.seconds = seconds
        self.escaper = SpecialTokenEscaper(special)

    def render(self, messages: Any, add_generation_prompt: bool = True, **extra: Any) -> str:
        """The conversation as one text, as a person would see it."""
        text, unescape_table = self.render_escaped(messages, add_generation_prompt, **extra)
        return text.translate(unescape_table)

    def render_escaped(
        self, messages: Any, add_generation_prompt: bool = True, **extra: Any
    ) -> tuple[str, dict[int, str]]:
        """Render a text in which every special token is the template's own, and the table that makes it readable.

        `extra` are more variables for the template (tools, documents, enable_thinking, ...), plain JSON values.
        Raises ConfigError for messages that are none, or that the template refuses; InvalidFileError where the
        template is broken, breaks out, or takes more than its share of time, memory or text.
        """
        hidden, unescape_table = self._escape_variables(messages, extra)
        return self._render(hidden, unescape_table, add_generation_prompt), unescape_table

    def render_turns(self, messages: Any, first: int = 0) -> RenderedTurns:
        """The conversation, and where in it an assistant spoke, from message `first` on.

        A turn is what the template adds to the prompt that asks for it: before it stands what `render` gives of the
        messages before it, whatever the template strips or joins. An assistant who speaks before anybody else was
        asked for nothing. Raises as `render_hidden`, and InvalidFileError for a template that writes the beginning of a
        conversation differently once it goes on.
        """
        if any(message.get("tool_calls") for message in messages) and "tool_calls" not in self.source:
            raise ConfigError(
                "an assistant's message has tool_calls, which the chat template does not write, so they could not be "
                "learned; use a template that does, or write them into the content"
            )
        hidden, unescape_table = self._escape_variables(messages, {})
        turns, text, spans = hidden["messages"], "", []
        for index in range(max(first, 1), len(messages)):
            if messages[index]["role"] == "assistant":
                before = self._render(hidden | {"messages": turns[:index]}, unescape_table, True)
                after = self._render(hidden | {"messages": turns[: index + 1]}, unescape_table, False)
                if not (before.startswith(text) and after.startswith(before)):
                    raise InvalidFileError(
                        f"the chat template ({' '.join(self.source.split())[:60]}...) writes what is before message "
                        f"{index + 1} differently once that is there, so what the assistant says cannot be told "
                        "from the rest; use a template that only adds"
                    )
                text = after
                spans.append((len(before), len(after)))
        return RenderedTurns(text, spans, unescape_table)

    def _escape_variables(self, messages: Any, extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, str]]:
        """Return the variables of a render with special tokens escaped, and the table that restores them."""
        variables = {"messages": plain_messages(messages, bool(_READS_PARTS.search(self.source))), **json_copy(extra)}
        length = sum(map(len, iterate_strings(variables)))
        if length > MAX_CHARACTERS:
            raise ConfigError(f"the messages have {length:,} characters; a chat may have {MAX_CHARACTERS:,}")
        return self.escaper.escape(variables, self.source)

    def _render(self, hidden: Mapping[str, Any], escapes: Mapping[int, str], add_generation_prompt: bool) -> str:
        variables = {"tools": None, "documents": None, **self.named_tokens, **hidden}
        variables["add_generation_prompt"] = add_generation_prompt
        return WORKER.render(self.source, variables, escapes, seconds=self.seconds)


def plain_messages(messages: Any, parts: bool = True) -> list[dict[str, Any]]:
    """Return the messages as plain JSON. Without `parts`, a content in parts becomes one text, a part a line.

    A key without a value is left out, a content too, as Transformers does.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ConfigError(
            f"messages should be a list of {{'role': ..., 'content': ...}} with at least one, "
            f"not {_shortened_repr(messages)}"
        )
    plain = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"message {number} should be {{'role': ..., 'content': ...}}, not {_shortened_repr(message)}"
            )
        fields = {key: value for key, value in message.items() if value is not None}
        content = fields.get("content", "")
        if isinstance(content, list | tuple):
            texts = [_part_text(number, part) for part in content]
            fields["content"] = content if parts else "\n".join(texts)
        elif not isinstance(content, str):
            raise ConfigError(
                f"the content of message {number} should be a text, or a list of "
                f"{{'type': 'text', 'text': ...}}, not {_shortened_repr(content)}"
            )
        plain.append(fields)
    return json_copy(plain)


def json_copy(value: Any) -> Any:
    """Return a deep copy of plain values. Raises ConfigError for anything that JSON and UTF-8 cannot hold."""
    try:
        copy = json.loads(json.dumps(value))
        for text in iterate_strings(copy):
            text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"messages and what goes with them should be plain JSON values: {error}") from None
    return copy


def _part_text(number: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ConfigError(
        f"a part of message {number} should be {{'type': 'text', 'text': ...}}, not {_shortened_repr(part)}; "
        "this model reads text only"
    )


def _shortened_repr(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "..."
