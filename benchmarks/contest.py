"""Contestants that take turns: each an object in a process of its own, told by name what to do.

    contestant = Contestant("peers:Training", peer="smolforge", ...)     a process begins to make it
    contestant.answer()                                                  it is made
    contestant.ask("turn", steps=5) ... contestant.answer()              others may work in between

A process of its own has a peak of memory, a compiler and failures of its own. One server process imports what all
need and is forked for each, so that none waits for imports; one of another environment is a program of its own there.
"""

import multiprocessing as mp
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

START: Any = mp.get_context("forkserver")
GRACE_SECONDS = 20


class ContestantError(Exception):
    """Why a contestant has nothing to say any more, in one line."""


class Contestant:
    """`maker` is module:class; `python` the interpreter of another environment; `log` gets what the process prints."""

    def __init__(self, maker: str, python: str | None = None, log: Path | None = None, **given: Any) -> None:
        self.pipe, theirs = START.Pipe()
        if python is None:
            child = START.Process(target=serve, args=(theirs, log))
            child.start()
            self.kill, self.wait = child.kill, child.join
        else:
            command = [python, __file__, str(theirs.fileno()), str(log or "")]
            program = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            self.kill, self.wait = program.kill, program.wait
        theirs.close()
        self.pipe.send((maker, given))

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """It ends when nobody listens any more, or else when it is made to."""
        self.pipe.close()
        made_to = threading.Timer(GRACE_SECONDS, self.kill)
        made_to.start()
        self.wait()
        made_to.cancel()

    def ask(self, method: str, **given: Any) -> None:
        try:
            self.pipe.send((method, given))
        except OSError:
            raise ContestantError("its process has ended") from None

    def answer(self, seconds: float | None = None) -> Any:
        """What the last thing asked for gave. Raises ContestantError where it raised, or took longer than `seconds`."""
        try:
            if not self.pipe.poll(seconds):
                self.kill()
                raise ContestantError(f"no answer in {seconds:.0f} seconds")
            fine, value = self.pipe.recv()
        except (EOFError, OSError):
            raise ContestantError("its process has ended") from None
        if not fine:
            raise ContestantError(value)
        return value


class Entrant:
    """A contestant in a race: what its turns gave, and why it left, if it did."""

    def __init__(self, contestant: Contestant, patience: Callable[[], float | None] = lambda: None) -> None:
        self.contestant, self.patience = contestant, patience
        self.turns: list[dict[str, Any]] = []
        self.failed: str | None = None
        self.hear()  # that it is made

    def ask(self, method: str, **given: Any) -> None:
        if self.failed is None:
            self._unless_it_fails(lambda: self.contestant.ask(method, **given))

    def hear(self) -> Any:
        if self.failed is None:
            return self._unless_it_fails(lambda: self.contestant.answer(self.patience()))
        return None

    def turn(self, **given: int) -> None:
        self.ask("turn", **given)
        self.hear_turn()

    def hear_turn(self) -> None:
        if (found := self.hear()) is not None:
            self.turns.append(found)

    def _unless_it_fails(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except ContestantError as why:
            self.failed = str(why)


def race(entrants: Sequence[Entrant], rounds: int, steps: int, warm: int, together: Sequence[Entrant] = ()) -> None:
    """A first step each, which allocates and compiles, side by side for those `together`; then rounds of turns."""
    for entrant in together:
        entrant.ask("turn", steps=1)
    for entrant in together:
        entrant.hear_turn()
    for entrant in entrants:
        if entrant not in together:
            entrant.turn(steps=1)
    for _ in range(rounds):
        for entrant in entrants:
            entrant.turn(steps=steps, warm=warm)


def serve(pipe: Connection, log: Path | None = None) -> None:
    """Make the object asked for and do as told until nobody listens."""
    if log is not None:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    try:
        maker, given = pipe.recv()
        module, _, name = maker.partition(":")
        made = getattr(import_module(module), name)(**given)
        pipe.send((True, None))
        while True:
            method, given = pipe.recv()
            pipe.send((True, getattr(made, method)(**given)))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        pipe.send((False, f"{type(error).__name__}: {first[:200]}"))


def start_by(method: str, *modules: str) -> None:
    """`forkserver`, which imports these modules for all, or `spawn`, where nothing is shared."""
    global START
    START = mp.get_context(method)
    START.set_forkserver_preload(list(modules))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Path(sys.argv[2]) if sys.argv[2] else None)
