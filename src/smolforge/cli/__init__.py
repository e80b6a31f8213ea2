"""The command line: one command a verb; here, and in `__main__` before it, argv is read and people are talked to.

Nothing heavy is imported before a command is known, so `--help` answers at once. Every error a user can
cause ends as one line and an exit code; `--debug` shows where it came from.
"""

import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING

from smolforge import __version__
from smolforge.config.custom_classes import admit, blamed
from smolforge.errors import Diverged, Elsewhere, InvalidFile, MissingResource, SettingError, Stopped

if TYPE_CHECKING:
    from cyclopts import App

UNEXPECTED, USAGE, INTERRUPTED = 1, 2, 130
LONGEST_LINE = 1200
ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
"""Threads that wait for each other sleep sooner, or one more busy process stops them all: docs/performance.md."""
HELP = """SmolLM2-135M and its kin, through their whole life.

With any command, --own module:Class lets models be loaded that have this class of yours in them, and --debug shows \
where an error came from. smolforge COMMAND --help has an example of each."""
COMMANDS = {
    "quickstart": "The whole life of a small model on this machine, offline, in about three minutes.",
    "prepare": "Text to token shards, which train reads with --data.sources OUT.",
    "train": "Train a recipe, or resume exactly what is in its run folder.",
    "generate": "Continue a text, streaming.",
    "chat": "Talk with a model on a terminal.",
    "serve": "Answer OpenAI's clients over HTTP: completions and chats, several at a time.",
    "verify": "Prove that a model is what it says.",
    "export": "Hand a model on, checked by a round trip.",
    "compare": "Runs side by side, or ideas by a study: a table, figures for print, one page.",
    "evaluate": "How good a model is: on a text, HellaSwag, ARC and others, or items of your own.",
    "inspect": "What a model, recipe, corpus or run is, and what it will need.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run a command line; returns its exit code."""
    words = [word for word in argv if word != "--debug"]
    debug = len(words) < len(argv)
    with _telling(), _terminated_as_interrupted():
        try:
            return _run(words, debug)
        except KeyboardInterrupt:  # also amid imports
            return _say(KeyboardInterrupt("interrupted"), INTERRUPTED, debug)


def program(verb: str | None = None) -> "App":
    """All commands, each imported when it is called; of `verb`, which is about to be, everything its help says."""
    from cyclopts import App, Parameter

    app = App(
        name="smolforge",
        help=HELP,
        version=__version__,
        help_format="markdown" if verb else "plaintext",  # which joins lines, and takes longer to import
        default_parameter=Parameter(negative=()),
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # it would leave without a word
    )
    for name, short in COMMANDS.items():
        app.command(f"smolforge.cli.{name}:{name}", name=name, help=None if name == verb else short)
    return app


def _run(words: Sequence[str], debug: bool) -> int:
    from cyclopts import CycloptsError

    words, own = _own_classes(words)
    app = program(next((word for word in words if word in COMMANDS), None))
    try:
        admit(own)
        code = app(words, exit_on_error=False, print_error=False) or 0
        _flush()
        return code
    except CycloptsError as error:
        return _say(SettingError(_usage(error, words)), USAGE, debug)
    except Elsewhere as error:
        return error.exit_code
    except (SettingError, InvalidFile, MissingResource, Diverged, Stopped) as error:
        return _say(error, error.exit_code, debug)
    except BrokenPipeError:
        _drop_output()
        return 0
    except Exception as error:
        return _say(*_known(error), debug)


def _flush() -> None:
    """Hear now of a full disk or a closed pipe: when it ends, Python has words and an exit code of its own for them."""
    try:
        print(end="", flush=True)
    except OSError as error:
        _drop_output()
        if not isinstance(error, BrokenPipeError):
            raise


def _drop_output() -> None:
    """What could not be written goes nowhere, or Python would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _own_classes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line without --own, and what each says."""
    rest, own, left = [], [], list(words)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if flag != "--own":
            rest.append(f"{flag}{equals}{value}")
        elif equals or left:
            own.append(value if equals else left.pop(0))
        else:
            rest.append(flag)
    return rest, own


def _usage(error: Exception, words: Sequence[str]) -> str:
    """What is wrong with a command line, where cyclopts would speak of tokens and types."""
    from cyclopts import CoercionError, MissingArgumentError, RepeatArgumentError, UnusedCliTokensError

    match error:
        case MissingArgumentError(argument=argument, command_chain=[*_, verb]) if argument is not None:
            known = {name for each in program()[verb].assemble_argument_collection() for name in each.names}
            given = [word.partition("=")[0] for word in words]
            near = [] if argument.name in given else get_close_matches(argument.name, {*given} - known, n=1)
            name = argument.name if argument.index is None else argument.name.removeprefix("--").upper()
            hint = f", not {near[0]}" if near else f"; smolforge {verb} --help explains it"
            return f"{verb} needs {name}{hint}"
        case CoercionError(argument=argument, token=token, target_type=kind) if token is not None and kind is not None:
            from pydantic import TypeAdapter

            from smolforge.config.base import in_words, shown

            name = token.keyword or (argument.name if argument is not None else "it")
            return f"{name} is {shown(token.value)}; it should be {in_words(TypeAdapter(kind).json_schema())}"
        case RepeatArgumentError(token=token):
            return f"{token.keyword} is given twice"
        case UnusedCliTokensError(unused_tokens=[word, *_]):
            return f"{word!r} is one word too many"
    return str(error)


def _known(error: Exception) -> tuple[Exception, int]:
    """What a person should know of an error that none of ours announces, and its exit code."""
    said = str(error)
    if place := blamed(error):
        return SettingError(f"{place}: {type(error).__name__}: {said}"), USAGE
    match error:
        case OSError(errno=errno.ENAMETOOLONG):
            return SettingError("that name is longer than any file's"), USAGE
        case OSError():
            return OSError(f"{error.filename}: {error.strerror}" if error.filename else said), MissingResource.exit_code
        case ValueError() if "embedded null" in said:
            return SettingError("a name has a zero byte in it, which no file's has"), USAGE
        case OverflowError():
            return SettingError("a number that was given is too large to count with"), USAGE
        case _ if "allocate memory" in said or "out of memory" in said.lower():
            short = "there is not enough memory; a smaller --train.micro-batch-size or model needs less"
            return MissingResource(short), MissingResource.exit_code
    unknown = f"this should not have happened: {type(error).__name__}: {said} (--debug shows where)"
    return RuntimeError(unknown), UNEXPECTED


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends what is under way as Ctrl-C does, so that nothing half-written is left. (train has its own way.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _telling() -> Iterator[None]:
    """Let people hear of downloads, and of warnings where no live display says them."""
    log, downloads = logging.getLogger("smolforge"), logging.getLogger("smolforge.hub")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("smolforge: %(message)s"))

    def wanted(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return record.name == downloads.name
        return all(other is handler or isinstance(other, logging.FileHandler) for other in log.handlers)

    handler.addFilter(wanted)
    level = downloads.level
    log.addHandler(handler)
    downloads.setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what it has to say comes as our sentence
    try:
        yield
    finally:
        log.removeHandler(handler)
        downloads.setLevel(level)


def _say(error: BaseException, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"smolforge: {one_line(str(error))}", file=sys.stderr)
    return code


def one_line(text: str) -> str:
    """What a terminal may be shown of a text that may come from a file: one line, no control characters, an end."""
    plain = "".join(each if each.isprintable() else "?" for each in " ".join(text.split()))
    return plain if len(plain) <= LONGEST_LINE else f"{plain[:LONGEST_LINE]} ..."
