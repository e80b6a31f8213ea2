"""A conversation as it goes on: what was said, what of it the model is shown, and how its answers are drawn.

What was said stays whole, to be saved; the model is shown its end, as much as its context takes.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge import atomic
from smolforge.cli import one_line
from smolforge.cli.flags import items
from smolforge.cli.generate import note, note_lost, visible
from smolforge.config import Generation
from smolforge.config.base import NONE, replaced, rule
from smolforge.errors import InvalidFile, SettingError

if TYPE_CHECKING:
    from smolforge.models.decoder import LanguageModel

MOST_TOKENS = 8192
"""Of a conversation, for models whose context is longer than memory may be."""
ANSWER_SHARE, KEPT_SHARE = 1 / 4, 1 / 2
"""Of the context: what an answer is left at most, and what stays of it when the oldest turns go."""


class Talk:
    """A conversation, how its answers are drawn, and the cache that its last answer came from."""

    def __init__(self, model: "LanguageModel", options: Generation) -> None:
        from smolforge.generation.stream import Voice

        self.voice = Voice(model, min(model.config.max_position_embeddings, MOST_TOKENS))
        self.tokenizer, self.capacity = self.voice.tokenizer, self.voice.capacity
        self.options, self.taught = options, self.tokenizer.template is not None
        self.told: str | None = None
        self.said: list[dict[str, Any]] = []
        self.forgotten = 0
        """Messages at the beginning of `said` that the model is not shown any more."""
        self.file: Path | None = None

    @property
    def greeting(self) -> str:
        if self.taught:
            return "Say something; the model answers, and remembers what was said. /help says more, Ctrl-D ends."
        return (
            "This is a base model, which was not taught to chat: type the beginning of a text, and it goes on. "
            "It remembers nothing. /help says more, Ctrl-D ends."
        )

    def say(self, text: str) -> None:
        """Answer a message, or go on with a text."""
        kept = self.said if self.taught else []
        self._answer([*kept, {"role": "user", "content": text}])

    def set(self, given: str) -> None:
        """Show all settings, or one and what it may be, or change one."""
        name, *value = re.split(r"[\s=]+", given, maxsplit=1)
        name = name.removeprefix("--").replace("-", "_")
        if not given:
            note("\n".join(f"{name:<20}{_written(each)}" for name, each in self.options.model_dump().items()))
        elif not value and name in Generation.model_fields:
            now = _written(self.options.model_dump()[name])
            note(f"{name} is {now}; it may be {rule(Generation, name)}")
        else:
            self.options = replaced(self.options, {name: _value(name, "".join(value))})

    def system(self, given: str) -> None:
        """Show, set or take back what the model is told first."""
        self._needs_template()
        if not given:
            note(visible(self.told) if self.told else "the model is told nothing first")
            return
        told, self.told = self.told, None if given == NONE else given
        try:
            self.tokenizer.chat(
                [*self._first(), {"role": "user", "content": ""}]
            )  # some templates take no such message
        except (SettingError, InvalidFile):
            self.told = told
            raise

    def retry(self, given: str) -> None:
        """Answer the last message anew."""
        place = next((i for i in reversed(range(len(self.said))) if self.said[i]["role"] == "user"), None)
        if place is None:
            raise SettingError("nothing was said yet that could be answered anew")
        self._answer(self.said[: place + 1])

    def save(self, given: str) -> None:
        """Write the conversation, over its own file but over no other."""
        self._needs_template()
        path = _named(given) if given else self.file
        if path is None:
            raise SettingError("/save needs the name of a file")
        if not self.said:
            raise SettingError("there is no conversation yet to save")
        if os.path.exists(path) and path != self.file:  # noqa: PTH110 (Path's own raises where one may not look)
            raise SettingError(f"{path} is there already; /save takes a name that is new")
        messages = [*self._first(), *self.said]
        atomic.replace(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        self.file = path
        note(f"wrote {len(messages)} messages to {one_line(str(path))}")

    def load(self, given: str) -> None:
        """Go on with a conversation from a file."""
        self._needs_template()
        if not given:
            raise SettingError("/load needs the name of a file")
        path = _named(given)
        first, *rest = messages = _conversation(path)
        self.tokenizer.chat(messages)  # before anything is changed
        self.told, self.said = (first["content"], rest) if first["role"] == "system" else (None, messages)
        self.forgotten, self.file = 0, path
        unanswered = "; the last has no answer yet, /retry gives one" if messages[-1]["role"] == "user" else ""
        note(f"read {len(messages)} messages{unanswered}")

    def clear(self, given: str) -> None:
        """Forget what was said, and keep what the model is told first."""
        self.said, self.forgotten, self.file = [], 0, None

    def _answer(self, said: list[dict[str, Any]]) -> None:
        """Say what follows, which becomes part of the conversation if there is any of it."""
        prompt, forgotten = self._fitting(said)
        text = self._spoken(prompt, "" if self.taught else said[-1]["content"])
        if text is not None:
            self.said, self.forgotten = [*said, {"role": "assistant", "content": text}], forgotten

    def _fitting(self, said: list[dict[str, Any]]) -> tuple[list[int], int]:
        """The prompt, without as many of the oldest turns as it takes for an answer to fit; and how many messages go.

        More go than must, since what is left is read from its beginning after each time.
        """
        from smolforge.generation.stream import prompt_ids

        note_lost(self.tokenizer.lost_bytes(said[-1]["content"]))
        if not self.taught:
            return prompt_ids(self.tokenizer, said[-1]["content"]), 0
        start = min(self.forgotten, len(said) - 1)
        ids = self.tokenizer.chat([*self._first(), *said[start:]])
        room = self.capacity - min(self.options.max_new_tokens, int(self.capacity * ANSWER_SHARE))
        turns = [place for place in range(start + 1, len(said)) if said[place]["role"] == "user"]
        while len(ids) > room and turns:
            start = turns.pop(0)
            ids = self.tokenizer.chat([*self._first(), *said[start:]])
            room = int(self.capacity * KEPT_SHARE)
        if start > self.forgotten and len(ids) < self.capacity:
            note(f"(the model's context is full: it is no longer shown the first {start} messages)")
        return ids, start

    def _spoken(self, prompt: list[int], beginning: str) -> str | None:
        """Print a beginning and the answer as it comes, and its speed; nothing is returned of one that never began."""
        begun, times, texts, reason = time.perf_counter(), [], [], None
        with _noted() as stopped:
            for piece in self.voice.stream(prompt, self.options, stopped):
                times += [time.perf_counter()] * len(piece.token_ids)
                texts.append(piece.text)
                reason = piece.finish_reason
                print(visible(beginning + piece.text), end="", flush=True)
                beginning = ""
        print(flush=True)
        note(f"({speed(begun, times)}{self._why(reason, len(prompt) + len(times))})")
        return "".join(texts) if times else None

    def _why(self, reason: str | None, tokens: int) -> str:
        """What there is to say of an answer's end, unless the model ended it."""
        if reason is None:
            return "; stopped"
        if reason == "stop":
            return ""
        full = tokens >= self.capacity
        return f"; the context, {self.capacity:,} tokens, is full" if full else "; /set max_new_tokens lets it go on"

    def _first(self) -> list[dict[str, Any]]:
        return [] if self.told is None else [{"role": "system", "content": self.told}]

    def _needs_template(self) -> None:
        if not self.taught:
            raise SettingError("there is no conversation with a base model: it goes on with one text at a time")


def speed(begun: float, times: list[float]) -> str:
    """How many tokens came at which times, and how fast behind the first, for which the prompt was read."""
    if not times:
        return "no token"
    said = f"{len(times)} token{'s' * (len(times) > 1)}"
    if times[-1] > times[0]:
        later = sum(each > times[0] for each in times)
        said += f", {later / (times[-1] - times[0]):.1f} tokens/s"
    return f"{said}, the first after {times[0] - begun:.2f} s"


def _written(value: Any) -> str:
    """A setting as /set takes it."""
    if value is None or value == ():
        return NONE
    return json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else str(value)


def _value(name: str, given: str) -> Any:
    """What is meant by what was typed; settings say whether it may be."""
    if name == "stop":
        return () if given == NONE else items(name, given)
    for number in (int, float):
        with suppress(ValueError):
            return number(given)
    return None if given == NONE else given


def _named(given: str) -> Path:
    """What is meant by a name; ~ is one's home."""
    return Path(os.path.expanduser(given))  # noqa: PTH111 (Path's own raises where there is no such user)


def _conversation(path: Path) -> list[dict[str, Any]]:
    """The messages in a file. Raises InvalidFile for one that has none, or more than one conversation."""
    from smolforge.data.prepare.conversations import conversation
    from smolforge.data.prepare.documents import read_text
    from smolforge.tokenizer.chat import as_json

    try:
        record = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidFile(f'{path} is not one JSON object {{"messages": [...]}}: {error}') from None
    return as_json(conversation(record, str(path))[0])


@contextmanager
def _noted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, so that what is under way ends in order; only a second one breaks into it."""
    asked = threading.Event()

    def note_it(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, note_it)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
