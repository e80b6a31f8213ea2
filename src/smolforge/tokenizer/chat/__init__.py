"""Messages in, the text a chat model was taught to read out: the model's own template, run in a process of its own.

What people wrote is told apart from what the template wrote, so that nobody's words become a special token.

Text whose special tokens are meant in; their ids, and the plain text between them, out.

Messages in, the same messages out with no special token in them; and back, once a template has laid them out.

    <|im_end|>   a user wrote this; in a template's text it would end the turn
    ?|im_end|>   so its first character is hidden: ? is a private code point that nothing else uses
    <|im_end|>   and comes back when the text has been split at the special tokens that are the template's own

A special token may also be put together from two strings, or from a string and the template's own text, so a string
that ends with the beginning of one, begins with the end of one, or lies inside one is hidden in the same way.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from smolforge.errors import InvalidFile, SettingError
from smolforge.tokenizer.chat.process import CHARACTERS, SECONDS, WORKER

WHITE = " \t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""White space as the tokenizers library has it; Python's strip() knows four more."""


class SpecialTokens:
    """The special tokens of a tokenizer, by their ids. Ordinary added tokens are left to the library."""

    def __init__(self, added: Mapping[int, AddedToken]) -> None:
        self.known = {token.content: (number, token) for number, token in added.items() if token.special}
        self.known.pop("", None)
        longest_first = sorted(self.known, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def split(self, text: str) -> list[str | int]:
        """Text, id, text, ..., text: some of the texts empty, the first and the last always there.

        The tokenizers library never merges across a special token, so encoding these is encoding the whole.
        """
        pieces, start = [], 0
        for match in self.pattern.finditer(text):
            number, token = self.known[match[0]]
            first, last = match.span()
            if token.single_word and (_in_word(text[max(0, first - 1) : first]) or _in_word(text[last : last + 1])):
                continue
            before = text[start:first]
            pieces += [before.rstrip(WHITE) if token.lstrip else before, number]
            start = last
            while token.rstrip and text[start : start + 1] in WHITE and start < len(text):
                start += 1
        return [*pieces, text[start:]]


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
PLAIN = {"system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "environment"} | {
    "observation",
    "role",
    "content",
    "type",
    "text",
}
"""Words of the protocol. Some templates make special tokens of them on purpose, as in '<|' + role + '|>'."""


class Hiding:
    """Hides the special tokens of everything that is not the template's."""

    def __init__(self, special: Sequence[str]) -> None:
        self.special = tuple(sorted({token for token in special if token}, key=len, reverse=True))
        self.longest = max(map(len, self.special), default=0)
        self.beginnings = {token[:size] for token in self.special for size in range(1, len(token))}
        self.ends = {token[size:] for token in self.special for size in range(1, len(token))}
        self.first = sorted({token[0] for token in self.special} | {end[0] for end in self.ends})

    def hide(self, value: Any, template: str) -> tuple[Any, dict[int, str]]:
        """A copy of the value, and the table for `str.translate` that brings the hidden characters back."""
        used = set(template).union(*self.special, *strings(value))
        free = (chr(code) for code in chain(*PRIVATE) if chr(code) not in used)
        hidden = dict(zip(self.first, free, strict=False))
        if len(hidden) < len(self.first):
            raise SettingError("the messages use every private-use character there is; leave some of them out")
        return self._copy(value, hidden), {ord(private): character for character, private in hidden.items()}

    def _copy(self, value: Any, hidden: dict[str, str]) -> Any:
        if isinstance(value, str):
            return self._text(value, hidden)
        if isinstance(value, dict):
            return {self._text(key, hidden): self._copy(item, hidden) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, hidden) for item in value]
        return value

    def _text(self, text: str, hidden: dict[str, str]) -> str:
        if not self.special or (text in PLAIN and text not in self.special):
            return text
        characters = list(text)
        for place in self._places(text):
            characters[place] = hidden[text[place]]
        return "".join(characters)

    def _places(self, text: str) -> Iterator[int]:
        """Where a special token begins, or could once text is put before or behind. Templates trim, so ends do too."""
        for token in self.special:
            place = text.find(token)
            while place >= 0:
                yield place
                place = text.find(token, place + 1)
        end = len(text.rstrip())
        for size in range(1, min(self.longest, end + 1)):
            if text[end - size : end] in self.beginnings:
                yield end - size
        body = text.strip()
        start = len(text) - len(text.lstrip())
        inside = len(body) < self.longest and any(body in token for token in self.special)
        if body and (inside or any(body[:size] in self.ends for size in range(1, self.longest))):
            yield start


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


__all__ = ["CHATML", "ChatTemplate", "Turns"]

CHATML = Path(__file__).with_name("chatml.jinja").read_text("utf-8")
"""The template of SmolLM2's instruct models, for tokenizers that come without one."""

_READS_PARTS = re.compile(r"""\.text\b|['"]text['"]""")


class Turns(NamedTuple):
    """A conversation to learn from."""

    text: str
    """Up to the end of the assistant's last turn; every special token in it is the template's own."""
    spans: list[tuple[int, int]]
    """First and last + 1 of what the template writes of each turn to learn, after the prompt that asks for it."""
    back: dict[int, str]
    """The table for `str.translate` that makes the text readable."""


class ChatTemplate:
    """One Jinja template, the special tokens of its tokenizer, and those it may ask for by name (bos_token, ...)."""

    def __init__(
        self, source: str, special: Sequence[str] = (), named: Mapping[str, str] | None = None, seconds: float = SECONDS
    ) -> None:
        self.source = source
        self.named = dict(named or {})
        self.seconds = seconds
        self.hiding = Hiding(special)

    def render(self, messages: Any, add_generation_prompt: bool = True, **extra: Any) -> str:
        """The conversation as one text, as a person would see it."""
        text, back = self.render_hidden(messages, add_generation_prompt, **extra)
        return text.translate(back)

    def render_hidden(
        self, messages: Any, add_generation_prompt: bool = True, **extra: Any
    ) -> tuple[str, dict[int, str]]:
        """The same, in which every special token is the template's own, and the table that makes it readable.

        `extra` are more variables for the template (tools, documents, enable_thinking, ...), plain JSON values.
        Raises SettingError for messages that are none, or that the template refuses; InvalidFile where the
        template is broken, breaks out, or takes more than its share of time, memory or text.
        """
        hidden, back = self._hidden(messages, extra)
        return self._written(hidden, add_generation_prompt), back

    def render_turns(self, messages: Any, first: int = 0) -> Turns:
        """The conversation, and where in it an assistant spoke, from message `first` on.

        A turn is what the template adds to the prompt that asks for it: before it stands what `render` gives of the
        messages before it, whatever the template strips or joins. An assistant who speaks before anybody else was
        asked for nothing. Raises as `render_hidden`, and InvalidFile for a template that writes the beginning of a
        conversation differently once it goes on.
        """
        if any(message.get("tool_calls") for message in messages) and "tool_calls" not in self.source:
            raise SettingError(
                "an assistant's message has tool_calls, which the chat template does not write, so they could not be "
                "learned; use a template that does, or write them into the content"
            )
        hidden, back = self._hidden(messages, {})
        turns, text, spans = hidden["messages"], "", []
        for place in range(max(first, 1), len(messages)):
            if messages[place]["role"] == "assistant":
                before = self._written(hidden | {"messages": turns[:place]}, True)
                after = self._written(hidden | {"messages": turns[: place + 1]}, False)
                if not (before.startswith(text) and after.startswith(before)):
                    raise InvalidFile(
                        f"the chat template ({' '.join(self.source.split())[:60]}...) writes what is before message "
                        f"{place + 1} differently once that is there, so what the assistant says cannot be told "
                        "from the rest; use a template that only adds"
                    )
                text = after
                spans.append((len(before), len(after)))
        return Turns(text, spans, back)

    def _hidden(self, messages: Any, extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, str]]:
        """The variables of a render without special tokens in them, and the table that brings those back."""
        said = {"messages": checked(messages, bool(_READS_PARTS.search(self.source))), **as_json(extra)}
        length = sum(map(len, strings(said)))
        if length > CHARACTERS:
            raise SettingError(f"the messages have {length:,} characters; a chat may have {CHARACTERS:,}")
        return self.hiding.hide(said, self.source)

    def _written(self, hidden: Mapping[str, Any], add_generation_prompt: bool) -> str:
        variables = {"tools": None, "documents": None, **self.named, **hidden}
        variables["add_generation_prompt"] = add_generation_prompt
        return WORKER.render(self.source, variables, self.seconds)


def checked(messages: Any, parts: bool = True) -> list[dict[str, Any]]:
    """The messages as plain JSON. Without `parts`, a content in parts becomes one text, a part a line.

    A key without a value is left out, as Transformers does.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise SettingError(
            f"messages should be a list of {{'role': ..., 'content': ...}} with at least one, not {_short(messages)}"
        )
    plain = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise SettingError(f"message {number} should be {{'role': ..., 'content': ...}}, not {_short(message)}")
        given = {key: value for key, value in message.items() if value is not None}
        content = given.get("content", "")
        if isinstance(content, list | tuple):
            texts = [_part(number, part) for part in content]
            given["content"] = content if parts else "\n".join(texts)
        elif not isinstance(content, str):
            raise SettingError(
                f"the content of message {number} should be a text, or a list of "
                f"{{'type': 'text', 'text': ...}}, not {_short(content)}"
            )
        plain.append(given)
    return as_json(plain)


def as_json(value: Any) -> Any:
    """A deep copy of plain values. Raises SettingError for anything that JSON and UTF-8 cannot hold."""
    try:
        copy = json.loads(json.dumps(value))
        for text in strings(copy):
            text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingError(f"messages and what goes with them should be plain JSON values: {error}") from None
    return copy


def _part(number: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise SettingError(
        f"a part of message {number} should be {{'type': 'text', 'text': ...}}, not {_short(part)}; "
        "this model reads text only"
    )


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "..."
