"""Messages in, the same messages out with no special token in them; and back, once a template has laid them out.

    <|im_end|>   a user wrote this; in a template's text it would end the turn
    ?|im_end|>   so its first character is hidden: ? is a private code point that nothing else uses
    <|im_end|>   and comes back when the text has been split at the special tokens that are the template's own

A special token may also be put together from two strings, or from a string and the template's own text, so a string
that ends with the beginning of one, begins with the end of one, or lies inside one is hidden in the same way.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from smolforge.errors import SettingError

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
