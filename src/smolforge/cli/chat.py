"""`smolforge chat`: a conversation on a terminal; with a base model, texts to continue.

    read_message -> /name  -> the command of that name
                 -> a text -> TerminalChat.say -> the messages that fit -> ChatSession -> terminal and conversation

A message is a line, lines that end in a backslash, a fenced block, or what is pasted. All messages are kept, to be
saved; the model gets the last ones, as many as its context takes.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge import atomic, operating_system
from smolforge.cli import handle_signal, one_line
from smolforge.cli.flags import LoadingFlags
from smolforge.cli.generate import (
    GenerationFlags,
    escape_controls,
    generation_from_flags,
    note_lost_bytes,
    print_note,
)
from smolforge.cli.overrides import split_list
from smolforge.cli.table import table_lines
from smolforge.config import Generation
from smolforge.config.base import NONE, allowed_values, replace_settings
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, Stopped, did_you_mean

if TYPE_CHECKING:
    from smolforge.models.decoder import LanguageModel

FENCE = '"""'
CONTINUATION = "\\"
MAX_CONTEXT_TOKENS = 8192
"""Of a conversation, for models whose context is longer than memory may be."""
MAX_ANSWER_SHARE, KEPT_CONTEXT_SHARE = 1 / 4, 1 / 2
"""Of the context: what an answer is left at most, and what stays of it when the oldest turns go."""
HELP = '''/set                show how answers are drawn; /set temperature 0.2 changes it, /set top_k none turns it off
/system TEXT        what the model is told first; /system none takes it back
/retry              another answer to the last message
/save FILE.jsonl    write the conversation as {"messages": [...]} on a line, which training reads with data.format chat
/load FILE.jsonl    go on with a conversation that is in such a file
/clear              begin anew
/exit               leave, as do Ctrl-D, and Ctrl-C twice
Ctrl-C stops an answer. A message of several lines: paste it, or begin and end it with """, or end each line but
the last with \\. One that begins with / takes a space before it.'''


def chat(
    model: str,
    *,
    system: str | None = None,
    draw: GenerationFlags | None = None,
    loading: LoadingFlags | None = None,
) -> None:
    """Talk with a model on a terminal.

    /help there says what can be done.

        smolforge chat runs/mine --temperature 0.7

    Parameters
    ----------
    model
        A Hub id, a model folder, a run folder or one of its checkpoints. One without a chat template goes on
        with the texts it is given.
    system
        What the model is told before the conversation.
    """
    options = generation_from_flags(draw)
    converse((loading or LoadingFlags()).load(model), options, system)


def converse(model: "LanguageModel", options: Generation, system: str | None = None) -> None:
    """Answer what is typed until the end of input, /exit, or Ctrl-C twice at the prompt."""
    session, warned = TerminalChat(model, options), False
    if system is not None:
        session.system(system)
    print_note(session.greeting)
    if sys.stdin.isatty():
        operating_system.enable_line_editing()
    with handle_signal(signal.SIGTERM, _end):
        while True:
            try:
                text = read_message()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if warned:
                    return
                print_note("(Ctrl-C again, or Ctrl-D, leaves)")
                warned = True
                continue
            warned = False
            if text.partition(" ")[0] == "/exit":
                return
            _handle_message(session, text)


def _handle_message(session: "TerminalChat", text: str) -> None:
    """Run a /command or answer a message; an error is printed as a sentence."""
    try:
        if text.startswith("/") and "\n" not in text:
            name, _, argument = text[1:].partition(" ")
            find_command(session, name)(argument.strip())
        elif text.strip():
            session.say(text)
    except (ConfigError, InvalidFileError, MissingResourceError) as error:
        print_note(one_line(str(error)))
    except KeyboardInterrupt:
        print_note("(stopped)")


def find_command(session: "TerminalChat", name: str) -> Callable[[str], None]:
    """Return the function of a /command. Raises ConfigError."""
    methods = (session.set, session.system, session.retry, session.save, session.load, session.clear)
    commands = {"help": lambda _: print_note(HELP)} | {method.__name__: method for method in methods}
    if name not in commands:
        hint = did_you_mean(name, [*commands, "exit"]).replace("mean ", "mean /") or " /help lists all."
        raise ConfigError(f"there is no command /{name}.{hint}")
    return commands[name]


class TerminalChat:
    """A conversation, its sampling settings, and the KV cache of its last answer."""

    def __init__(self, model: "LanguageModel", options: Generation) -> None:
        from smolforge.generation.stream import ChatSession

        self.chat_session = ChatSession(model, min(model.config.max_position_embeddings, MAX_CONTEXT_TOKENS))
        self.tokenizer, self.capacity = self.chat_session.tokenizer, self.chat_session.capacity
        self.options, self.has_template = options, self.tokenizer.template is not None
        self.system_message: str | None = None
        self.messages: list[dict[str, Any]] = []
        self.num_hidden = 0
        """The first messages, which the model does not get any more."""
        self.file: Path | None = None

    @property
    def greeting(self) -> str:
        if self.has_template:
            return "Say something; the model answers, and remembers what was said. /help says more, Ctrl-D ends."
        return (
            "This is a base model, which was not taught to chat: type the beginning of a text, and it goes on. "
            "It remembers nothing. /help says more, Ctrl-D ends."
        )

    def say(self, text: str) -> None:
        """Answer a message, or continue a text."""
        history = self.messages if self.has_template else []
        self._answer([*history, {"role": "user", "content": text}])

    def set(self, argument: str) -> None:
        """Show all settings, show one with its allowed values, or change one."""
        name, *value = re.split(r"[\s=]+", argument, maxsplit=1)
        name = name.removeprefix("--").replace("-", "_")
        if not argument:
            settings = self.options.model_dump().items()
            print_note("\n".join(table_lines(((key, _format_setting(value)) for key, value in settings), align="<")))
        elif not value and name in Generation.model_fields:
            current = _format_setting(self.options.model_dump()[name])
            print_note(f"{name} is {current}; it may be {allowed_values(Generation, name)}")
        else:
            self.options = replace_settings(self.options, {name: _parse_setting(name, "".join(value))})

    def system(self, argument: str) -> None:
        """Show, set or remove the system message."""
        self._require_template()
        if not argument:
            print_note(escape_controls(self.system_message or "the model is told nothing first"))
            return
        previous, self.system_message = self.system_message, None if argument == NONE else argument
        try:
            # some templates take no such message
            self.tokenizer.chat([*self._system_messages(), {"role": "user", "content": ""}])
        except (ConfigError, InvalidFileError):
            self.system_message = previous
            raise

    def retry(self, argument: str) -> None:
        """Answer the last user message again."""
        user_turns = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not user_turns:
            raise ConfigError("nothing was said yet that could be answered anew")
        self._answer(self.messages[: user_turns[-1] + 1])

    def save(self, argument: str) -> None:
        """Write the conversation to a file; only its own file is overwritten."""
        self._require_template()
        path = _expand_user(argument) if argument else self.file
        if path is None:
            raise ConfigError("/save needs the name of a file")
        if not self.messages:
            raise ConfigError("there is no conversation yet to save")
        if os.path.exists(path) and path != self.file:  # noqa: PTH110 (Path's own raises where one may not look)
            raise ConfigError(f"{path} is there already; /save takes a name that is new")
        messages = [*self._system_messages(), *self.messages]
        atomic.write_text_atomic(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        self.file = path
        print_note(f"wrote {len(messages)} messages to {one_line(str(path))}")

    def load(self, argument: str) -> None:
        """Continue a conversation from a file."""
        self._require_template()
        if not argument:
            raise ConfigError("/load needs the name of a file")
        path = _expand_user(argument)
        first, *turns = messages = _read_conversation(path)
        self.tokenizer.chat(messages)  # before anything is changed
        has_system = first["role"] == "system"
        self.system_message, self.messages = (first["content"], turns) if has_system else (None, messages)
        self.num_hidden, self.file = 0, path
        unanswered = "; the last has no answer yet, /retry gives one" if messages[-1]["role"] == "user" else ""
        print_note(f"read {len(messages)} messages{unanswered}")

    def clear(self, argument: str) -> None:
        """Drop the messages and keep the system message."""
        self.messages, self.num_hidden, self.file = [], 0, None

    def _answer(self, messages: list[dict[str, Any]]) -> None:
        """Print an answer to the messages, and add it to the conversation if it has any token."""
        prompt, num_hidden = self._fit_prompt(messages)
        text = self._print_answer(prompt, "" if self.has_template else messages[-1]["content"])
        if text is not None:
            self.messages, self.num_hidden = [*messages, {"role": "assistant", "content": text}], num_hidden

    def _fit_prompt(self, messages: list[dict[str, Any]]) -> tuple[list[int], int]:
        """Return the prompt without the oldest turns, so that an answer fits, and the number of messages dropped.

        More go than must, since what is left is read from its beginning after each time.
        """
        from smolforge.generation.stream import prompt_ids

        note_lost_bytes(self.tokenizer.lost_bytes(messages[-1]["content"]))
        if not self.has_template:
            return prompt_ids(self.tokenizer, messages[-1]["content"]), 0
        start = min(self.num_hidden, len(messages) - 1)
        ids = self.tokenizer.chat([*self._system_messages(), *messages[start:]])
        max_prompt_tokens = self.capacity - min(self.options.max_new_tokens, int(self.capacity * MAX_ANSWER_SHARE))
        turns = [index for index in range(start + 1, len(messages)) if messages[index]["role"] == "user"]
        while len(ids) > max_prompt_tokens and turns:
            start = turns.pop(0)
            ids = self.tokenizer.chat([*self._system_messages(), *messages[start:]])
            max_prompt_tokens = int(self.capacity * KEPT_CONTEXT_SHARE)
        if start > self.num_hidden and len(ids) < self.capacity:
            print_note(f"(the model's context is full: it is no longer shown the first {start} messages)")
        return ids, start

    def _print_answer(self, prompt: list[int], prefix: str) -> str | None:
        """Print `prefix`, the answer as it comes, and its speed; return None where no token came."""
        start, token_times, texts, finish_reason = time.perf_counter(), [], [], None
        with _defer_interrupt() as was_interrupted:
            for chunk in self.chat_session.stream(prompt, self.options, was_interrupted):
                token_times += [time.perf_counter()] * len(chunk.token_ids)
                texts.append(chunk.text)
                finish_reason = chunk.finish_reason
                print(escape_controls(prefix + chunk.text), end="", flush=True)
                prefix = ""
        print(flush=True)
        is_full = len(prompt) + len(token_times) >= self.capacity
        full = f"; the context, {self.capacity:,} tokens, is full"
        endings = {None: "; stopped", "stop": "", "length": full if is_full else "; /set max_new_tokens lets it go on"}
        print_note(f"({format_speed(start, token_times)}{endings[finish_reason]})")
        return "".join(texts) if token_times else None

    def _system_messages(self) -> list[dict[str, Any]]:
        return [] if self.system_message is None else [{"role": "system", "content": self.system_message}]

    def _require_template(self) -> None:
        if not self.has_template:
            raise ConfigError("there is no conversation with a base model: it goes on with one text at a time")


def format_speed(start: float, token_times: list[float]) -> str:
    """Return the number of tokens, their rate after the first one, and the time to the first (prefill)."""
    if not token_times:
        return "no token"
    text = f"{len(token_times)} token{'s' * (len(token_times) > 1)}"
    if token_times[-1] > token_times[0]:
        num_later = sum(arrival > token_times[0] for arrival in token_times)
        text += f", {num_later / (token_times[-1] - token_times[0]):.1f} tokens/s"
    return f"{text}, the first after {token_times[0] - start:.2f} s"


def _format_setting(value: Any) -> str:
    """Format a value as /set takes it."""
    if value is None or value == ():
        return NONE
    return json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else str(value)


def _parse_setting(name: str, text: str) -> Any:
    """Parse what was typed; the settings check whether it is valid."""
    if name == "stop":
        return () if text == NONE else split_list(name, text)
    for convert in (int, float):
        with suppress(ValueError):
            return convert(text)
    return None if text == NONE else text


def _expand_user(name: str) -> Path:
    """Return the path of a file name; ~ is the home folder."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (Path's own raises where there is no such user)


def _read_conversation(path: Path) -> list[dict[str, Any]]:
    """Read the messages in a file. Raises InvalidFileError where it has none, or more than one conversation."""
    from smolforge.data.prepare.conversations import parse_conversation
    from smolforge.data.prepare.documents import read_text
    from smolforge.tokenizer.chat import json_copy

    try:
        record = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidFileError(f'{path} is not one JSON object {{"messages": [...]}}: {error}') from None
    return json_copy(parse_conversation(record, str(path))[0])


@contextmanager
def _defer_interrupt() -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C, so that an answer ends in order; a second one interrupts at once."""
    interrupted = threading.Event()

    def on_interrupt(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    with handle_signal(signal.SIGINT, on_interrupt):
        yield interrupted.is_set


def _end(*_: object) -> None:
    """End the chat, which a Ctrl-C would not: it only stops an answer."""
    raise Stopped("the chat was ended by a signal", 130)


def read_message() -> str:
    """Return the next message. Raises EOFError at the end of input, KeyboardInterrupt for Ctrl-C."""
    text = _read_line("> ")
    if text.lstrip().startswith(FENCE):
        return _read_fenced(text.lstrip().removeprefix(FENCE))
    while text.endswith(CONTINUATION):
        text = text.removesuffix(CONTINUATION) + "\n" + _read_line("... ")
    return text.strip("\n")


def _read_fenced(text: str) -> str:
    """Return all text up to the closing fence; `text` is what follows the opening one."""
    while not text.rstrip().endswith(FENCE):
        text += "\n" + _read_line("... ")
    return text.rstrip().removesuffix(FENCE).strip("\n")


def _read_line(prompt: str) -> str:
    while True:
        try:
            text = input(prompt if sys.stdin.isatty() else "")
        except UnicodeDecodeError:
            print_note("(that was not UTF-8 text)")
            continue
        # In the C locale bytes beyond ASCII come as halves of characters.
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
