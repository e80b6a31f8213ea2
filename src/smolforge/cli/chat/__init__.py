"""`smolforge chat`: a conversation on a terminal; with a base model, texts to go on with.

keyboard.message -> /word  -> the command of that name
                 -> a text -> Talk.say -> what of the conversation fits -> Voice -> the screen, and the conversation

What is typed, a message at a time: a line, lines that end in a backslash, a fenced block, or what is pasted.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smolforge.cli import one_line
from smolforge.cli.chat.session import Talk
from smolforge.cli.generate import Draw, drawn, loaded, note
from smolforge.config import Generation
from smolforge.errors import InvalidFile, MissingResource, SettingError, Stopped, did_you_mean

FENCE = '"""'
GOES_ON = "\\"


def edited() -> None:
    """Let lines be edited and called back, where there is a library for it, and a pasted block be one line to it."""
    if not sys.stdin.isatty():
        return
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")


def message() -> str:
    """The next message. Raises EOFError where there is none, KeyboardInterrupt for Ctrl-C."""
    text = _line("> ")
    if text.lstrip().startswith(FENCE):
        return _fenced(text.lstrip().removeprefix(FENCE))
    while text.endswith(GOES_ON):
        text = text.removesuffix(GOES_ON) + "\n" + _line("... ")
    return text.strip("\n")


def _fenced(text: str) -> str:
    """All up to the fence that closes; `text` is what stands behind the one that opens."""
    while not text.rstrip().endswith(FENCE):
        text += "\n" + _line("... ")
    return text.rstrip().removesuffix(FENCE).strip("\n")


def _line(prompt: str) -> str:
    while True:
        try:
            text = input(prompt if sys.stdin.isatty() else "")
        except UnicodeDecodeError:
            note("(that was not UTF-8 text)")
            continue
        # In the C locale bytes beyond ASCII come as halves of characters.
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


if TYPE_CHECKING:
    from smolforge.models.decoder import LanguageModel

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
    draw: Draw | None = None,
    dtype: str = "float32",
    device: str = "auto",
    random: bool = False,
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
    dtype
        float32, bfloat16, float16 or float64.
    device
        cpu, cuda or mps; auto takes the fastest present.
    random
        Let a preset speak with random weights.
    """
    options = drawn(draw)
    converse(loaded(model, dtype, device, random), options, system)


def converse(model: "LanguageModel", options: Generation, system: str | None = None) -> None:
    """Answer what is typed until the end of input, /exit, or Ctrl-C twice at the prompt."""
    talk, warned = Talk(model, options), False
    if system is not None:
        talk.system(system)
    note(talk.greeting)
    edited()
    with _ended_by_sigterm():
        while True:
            try:
                text = message()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if warned:
                    return
                note("(Ctrl-C again, or Ctrl-D, leaves)")
                warned = True
                continue
            warned = False
            if text.partition(" ")[0] == "/exit":
                return
            _heard(talk, text)


def _heard(talk: Talk, text: str) -> None:
    """Do what a message asks for; what cannot be done is said in a sentence."""
    try:
        if text.startswith("/") and "\n" not in text:
            word, _, rest = text[1:].partition(" ")
            command(talk, word)(rest.strip())
        elif text.strip():
            talk.say(text)
    except (SettingError, InvalidFile, MissingResource) as error:
        note(one_line(str(error)))
    except KeyboardInterrupt:
        note("(stopped)")


def command(talk: Talk, word: str) -> Callable[[str], None]:
    """What a word behind a slash stands for. Raises SettingError."""
    known: dict[str, Callable[[str], None]] = {
        "help": lambda _: note(HELP),
        "set": talk.set,
        "system": talk.system,
        "retry": talk.retry,
        "save": talk.save,
        "load": talk.load,
        "clear": talk.clear,
    }
    if word not in known:
        hint = did_you_mean(word, [*known, "exit"]).replace("mean ", "mean /") or " /help lists all."
        raise SettingError(f"there is no command /{word}.{hint}")
    return known[word]


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM is no Ctrl-C here, which would not end the program."""

    def end(*_: object) -> None:
        raise Stopped("the chat was ended by a signal", 130)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
