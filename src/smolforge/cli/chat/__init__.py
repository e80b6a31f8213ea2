"""`smolforge chat`: a conversation on a terminal; with a base model, texts to continue.

    read_message -> /name  -> the command of that name
                 -> a text -> TerminalChat.say -> the messages that fit -> ChatSession -> terminal and conversation

A message is a line, lines that end in a backslash, a fenced block, or what is pasted.
"""

import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from smolforge.cli import handle_signal, one_line
from smolforge.cli.chat.session import TerminalChat
from smolforge.cli.flags import LoadingFlags
from smolforge.cli.generate import GenerationFlags, generation_from_flags, load_for_generation, print_note
from smolforge.config import Generation
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, Stopped, did_you_mean

if TYPE_CHECKING:
    from smolforge.models.decoder import LanguageModel

FENCE = '"""'
CONTINUATION = "\\"
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
    converse(load_for_generation(model, loading), options, system)


def converse(model: "LanguageModel", options: Generation, system: str | None = None) -> None:
    """Answer what is typed until the end of input, /exit, or Ctrl-C twice at the prompt."""
    session, warned = TerminalChat(model, options), False
    if system is not None:
        session.system(system)
    print_note(session.greeting)
    enable_line_editing()
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


def _handle_message(session: TerminalChat, text: str) -> None:
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


def find_command(session: TerminalChat, name: str) -> Callable[[str], None]:
    """Return the function of a /command. Raises ConfigError."""
    commands: dict[str, Callable[[str], None]] = {
        "help": lambda _: print_note(HELP),
        "set": session.set,
        "system": session.system,
        "retry": session.retry,
        "save": session.save,
        "load": session.load,
        "clear": session.clear,
    }
    if name not in commands:
        hint = did_you_mean(name, [*commands, "exit"]).replace("mean ", "mean /") or " /help lists all."
        raise ConfigError(f"there is no command /{name}.{hint}")
    return commands[name]


def _end(*_: object) -> None:
    """End the chat, which a Ctrl-C would not: it only stops an answer."""
    raise Stopped("the chat was ended by a signal", 130)


def enable_line_editing() -> None:
    """Turn on line editing, history and bracketed paste where readline is installed."""
    if not sys.stdin.isatty():
        return
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")


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
