"""What is typed, a message at a time: a line, lines that end in a backslash, a fenced block, or what is pasted."""

import sys

from smolforge.cli.speech import note

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
