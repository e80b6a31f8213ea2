"""Text whose special tokens are meant in; their ids, and the plain text between them, out."""

import re
from collections.abc import Mapping

from tokenizers import AddedToken

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
