"""Ids that come one at a time, as text."""

from smolforge.tokenizer import Tokenizer


class IncrementalDecoder:
    """Ids in one at a time, text out as soon as its characters are whole.

    The joined pieces equal `decode` of all ids; a character cut in the middle waits for its rest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.settled: list[int] = []  # the last ids already given out, kept as context
        self.waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that became whole with this id, perhaps none."""
        self.waiting.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self.settled, self.waiting = self.waiting, []
        return text

    def finish(self) -> str:
        """What is still waiting, broken as it may be."""
        text = self._new_text() if self.waiting else ""
        self.settled, self.waiting = self.waiting, []
        return text

    def _new_text(self) -> str:
        # Decoded behind the ids before it, since some decoders treat the first token differently.
        before = self.tokenizer.decode(self.settled)
        return self.tokenizer.decode(self.settled + self.waiting)[len(before) :]
