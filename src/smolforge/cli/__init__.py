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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from smolforge import __version__, operating_system
from smolforge.errors import (
    ConfigError,
    FailedOnRankZeroError,
    InvalidFileError,
    MissingResourceError,
    Stopped,
    TrainingDivergedError,
    exit_code_of,
)

if TYPE_CHECKING:
    from cyclopts import App

EXIT_INTERRUPTED = 130
MAX_LINE_LENGTH = 1200
TOO_LONG = "{} is longer than the {:,} characters that a path may have here; choose a shorter folder"
DEFAULT_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
"""Threads that wait for each other sleep sooner, or one more busy process stops them all: docs/performance.md."""
HELP = """SmolLM2-135M and its kin, through their whole life.

With any command, --own module:Class lets models be loaded that have this class of yours in them, and --debug shows \
where an error came from and what of a model's files was ignored or renamed. smolforge COMMAND --help has an example \
of each."""
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
    prepare_streams()
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def prepare_streams() -> None:
    """Let a console that lacks a character print its code instead, and let Windows' files and pipes have UTF-8.

    An encoding that PYTHONIOENCODING names stays.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):  # a notebook's
            continue
        if operating_system.IS_WINDOWS and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
            stream.reconfigure(encoding="utf-8", newline=None if stream is sys.stdin else "\n")
        if stream is not sys.stdin:
            stream.reconfigure(errors="backslashreplace")


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    args = [arg for arg in argv if arg != "--debug"]
    debug = len(args) < len(argv)
    # SIGTERM is as Ctrl-C, so that nothing half-written is left; train has its own handler.
    with _log_to_stderr_filtered(debug), handle_signal(signal.SIGTERM, signal.default_int_handler):
        try:
            return _run(args, debug)
        except KeyboardInterrupt:  # also amid imports
            return _print_error(Stopped("interrupted", EXIT_INTERRUPTED), debug)


def build_cli(command: str | None = None) -> "App":
    """Return the app with all commands, each imported when called; `command`, the one to be run, has its full help."""
    from cyclopts import App, Parameter

    app = App(
        name="smolforge",
        help=HELP,
        version=__version__,
        help_format="markdown" if command else "plaintext",  # which joins lines, and takes longer to import
        default_parameter=Parameter(negative=()),
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # it would leave without a word
    )
    for name, short in COMMANDS.items():
        app.command(f"smolforge.cli.{name}:{name}", name=name, help=None if name == command else short)
    return app


def _run(args: Sequence[str], debug: bool) -> int:
    from cyclopts import CycloptsError

    app = build_cli(next((arg for arg in args if arg in COMMANDS), None))
    try:
        args, custom_classes = _split_custom_classes(args)
        if custom_classes:
            from smolforge.config.custom_classes import import_classes

            import_classes(custom_classes)
        code = app(args, exit_on_error=False, print_error=False) or 0
        _flush_output()
        return code
    except CycloptsError as error:
        return _print_error(ConfigError(_explain_usage_error(error, args)), debug)
    except FailedOnRankZeroError as error:
        return error.exit_code
    except (ConfigError, InvalidFileError, MissingResourceError, TrainingDivergedError, Stopped) as error:
        return _print_error(error, debug)
    except Exception as error:
        if operating_system.is_broken_pipe(error):
            _drop_output()
            return 0
        return _print_error(_explain_error(error), debug)


def _flush_output() -> None:
    """Flush now: a full disk or a closed pipe is reported by us, not by Python at its exit."""
    try:
        print(end="", flush=True)
    except OSError as error:
        _drop_output()
        if not operating_system.is_broken_pipe(error):
            raise


def _drop_output() -> None:
    """Send standard output nowhere; else Python would try once more to write at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _split_custom_classes(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the command line without --own, and the values of --own. Raises ConfigError."""
    from argparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--own", action="append", default=[])
    try:
        flags, remaining = parser.parse_known_args(args)
    except ArgumentError:
        raise ConfigError("--own needs a value") from None
    return remaining, flags.own


def _explain_usage_error(error: Exception, args: Sequence[str]) -> str:
    """Return what is wrong with a command line, without cyclopts' words for tokens and types."""
    from cyclopts import CoercionError, MissingArgumentError, RepeatArgumentError, UnusedCliTokensError

    match error:
        case MissingArgumentError(argument=argument, command_chain=[*_, command]) if argument is not None:
            flags = {name for option in build_cli()[command].assemble_argument_collection() for name in option.names}
            typed = [arg.partition("=")[0] for arg in args]
            suggestions = [] if argument.name in typed else get_close_matches(argument.name, {*typed} - flags, n=1)
            name = argument.name if argument.index is None else argument.name.removeprefix("--").upper()
            hint = f", not {suggestions[0]}" if suggestions else f"; smolforge {command} --help explains it"
            return f"{command} needs {name}{hint}"
        case CoercionError(argument=argument, token=token, target_type=kind) if token is not None and kind is not None:
            from pydantic import TypeAdapter

            from smolforge.config.base import describe_schema
            from smolforge.formatting import format_value

            name = token.keyword or (argument.name if argument is not None else "it")
            expected = describe_schema(TypeAdapter(kind).json_schema())
            return f"{name} is {format_value(token.value)}; it should be {expected}"
        case RepeatArgumentError(token=token):
            return f"{token.keyword} is given twice"
        case UnusedCliTokensError(unused_tokens=[arg, *_]):
            return f"{arg!r} is one word too many"
    return str(error)


def _explain_error(error: Exception) -> Exception:
    """Return an error the user can act on for one that is not ours."""
    from smolforge.config.custom_classes import error_location

    message = str(error)
    if location := error_location(error):
        return ConfigError(f"{location}: {type(error).__name__}: {message}")
    match error:
        case OSError(errno=errno.ENAMETOOLONG):
            return ConfigError("that name is longer than any file's")
        case OSError(filename=str(path)) if len(os.path.abspath(path)) > operating_system.max_path_length():  # noqa: PTH100 (of any text)
            return ConfigError(TOO_LONG.format(path, operating_system.max_path_length()))
        case OSError():
            return MissingResourceError(f"{error.filename}: {error.strerror}" if error.filename else message)
        case ValueError() if "embedded null" in message:
            return ConfigError("a name has a zero byte in it, which no file's has")
        case OverflowError():
            return ConfigError("a number that was given is too large to count with")
        case _ if "allocate memory" in message or "out of memory" in message.lower():
            advice = "there is not enough memory; a smaller --train.micro-batch-size or model needs less"
            return MissingResourceError(advice)
    return RuntimeError(f"this should not have happened: {type(error).__name__}: {message} (--debug shows where)")


@contextmanager
def handle_signal(number: int, handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Call a handler for a signal; Python lets only the main thread set one."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(number, handler) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(number, before or signal.SIG_DFL)


@contextmanager
def _log_to_stderr_filtered(debug: bool) -> Iterator[None]:
    """Log downloads to standard error, warnings where no live display shows them, and, once, what `debug` is for."""
    log, downloads, debug_lines = logging.getLogger("smolforge"), logging.getLogger("smolforge.hub"), set[str]()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("smolforge: %(message)s"))

    def should_print(record: logging.LogRecord) -> bool:
        if record.levelno == logging.DEBUG:
            is_new = record.getMessage() not in debug_lines
            debug_lines.add(record.getMessage())
            return is_new
        if record.levelno < logging.WARNING:
            return record.name == downloads.name
        return all(attached is handler or isinstance(attached, logging.FileHandler) for attached in log.handlers)

    handler.addFilter(should_print)
    levels = log.level, downloads.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else log.level)
    downloads.setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what it has to say comes as our sentence
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(levels[0])
        downloads.setLevel(levels[1])


def _print_error(error: Exception, debug: bool) -> int:
    """Print an error as one line, and return its exit code."""
    if debug:
        import traceback

        traceback.print_exc()
    print(f"smolforge: {one_line(str(error))}", file=sys.stderr)
    return exit_code_of(error)


def one_line(text: str) -> str:
    """Make text from a file safe for a terminal: one line, no control characters, cut to a maximum length."""
    plain = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return plain if len(plain) <= MAX_LINE_LENGTH else f"{plain[:MAX_LINE_LENGTH]} ..."
