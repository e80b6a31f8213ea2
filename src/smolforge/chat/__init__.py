"""Messages in, the text a chat model was taught to read out: the model's own template, run in a process of its own.

What people wrote is told apart from what the template wrote, so that nobody's words become a special token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smolforge.chat.hiding import Hiding, strings
from smolforge.chat.process import CHARACTERS, SECONDS, WORKER
from smolforge.errors import InvalidFile, SettingError

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
