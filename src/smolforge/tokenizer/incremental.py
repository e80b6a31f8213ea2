"""Ids that come one at a time, as text."""

from smolforge.tokenizer import Tokenizer


class IncrementalDecoder:
    """Ids in one at a time, text out as soon as its characters are whole.

    The joined pieces equal `decode` of all ids; a character cut in the middle waits for its rest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.context: list[int] = []  # the last ids already given out, kept as context
        self.pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that became whole with this id, perhaps none."""
        self.pending.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self.context, self.pending = self.pending, []
        return text

    def finish(self) -> str:
        """What is still waiting, broken as it may be."""
        text = self._new_text() if self.pending else ""
        self.context, self.pending = self.pending, []
        return text

    def _new_text(self) -> str:
        # Decoded behind the ids before it, since some decoders treat the first token differently.
        before = self.tokenizer.decode(self.context)
        return self.tokenizer.decode(self.context + self.pending)[len(before) :]
