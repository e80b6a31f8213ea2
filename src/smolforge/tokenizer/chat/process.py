"""A template and its variables in, text out: the parent's side of the process that templates run in.

One child serves all templates of this process, a render at a time. It is started when first needed, killed when
it is late, started again when it is gone, and never shared with a fork.
"""

import atexit
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smolforge import operating_system
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError

RENDER_SECONDS = 1.0
"""For one render. The official template takes a thousandth of it."""
MAX_CHARACTERS = 1 << 20
MEMORY_BYTES = 128 << 20
START_BYTES = 64 << 20
"""For Python and Jinja, at most."""
WATCH_SECONDS = 0.02
"""Between two looks at the child's memory, on systems that do not limit it."""
START_SECONDS = 30.0
"""For Python and Jinja to start: a tenth of a second, but more on a machine that is busy."""

ERROR_MESSAGES = {
    "syntax": "the chat template is not valid Jinja ({})",
    "forbidden": "the chat template tried what no template may ({})",
    "undefined": "the chat template wants something that is not there ({})",
    "large": "the chat template needs more memory or depth than it may have ({})",
    "long": "the chat template wrote more than the {characters:,} characters it may",
    "late": "the chat template took more than the {seconds:g} s it may",
    "gone": "the chat template ended the process it ran in",
    "failed": "the chat template does not work with these messages ({})",
}
HINT = "; use a model whose template you trust, or correct its chat_template.jinja"


class Worker:
    """The child and its two pipes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.child: subprocess.Popen[bytes] | None = None

    def render(
        self,
        source: str,
        variables: dict[str, Any],
        escapes: Mapping[int, str] | None = None,
        *,
        seconds: float = RENDER_SECONDS,
    ) -> str:
        """The template's text; `escapes` restores the escaped characters in the variables.

        Raises ConfigError in the template's own words, InvalidFileError for a bad template.
        """
        request = {"source": source, "variables": variables, "seconds": seconds, "characters": MAX_CHARACTERS}
        request["escapes"] = {chr(code): text for code, text in (escapes or {}).items()}
        line = json.dumps(request).encode() + b"\n"
        with self.lock:
            reply = self._ask(line, seconds)
        if "text" in reply:
            return reply["text"]
        kind, detail = reply["error"], reply["says"]
        if kind == "refused":
            raise ConfigError(f"the chat template says: {detail}")
        short = detail if len(detail) <= 200 else detail[:200] + "..."
        raise InvalidFileError(ERROR_MESSAGES[kind].format(short, characters=MAX_CHARACTERS, seconds=seconds) + HINT)

    def close(self) -> None:
        """End the child, if there is one. The next render starts another."""
        if self.child is None:
            return
        child, self.child = self.child, None
        child.kill()
        child.wait()
        _close_pipes(child)

    def forget(self) -> None:
        """In a fork: the child is the parent's, and so is a lock that was held."""
        self.lock = threading.Lock()
        if self.child is not None:
            self.child.returncode = 0  # not ours to wait for
            _close_pipes(self.child)
            self.child = None

    def _ask(self, line: bytes, seconds: float) -> dict[str, str]:
        """One request and its answer; a second try where the child was gone before it could begin."""
        for fresh in (self.child is None, True):
            child = self.child if self.child and self.child.poll() is None else self._start()
            try:
                answer, killed_as = _exchange(child, line, seconds)
            except BaseException:  # Ctrl-C between question and answer: the next question must not read this answer
                self.close()
                raise
            if answer:
                return json.loads(answer)
            self.close()
            if killed_as:
                return {"error": killed_as, "says": "MemoryError" if killed_as == "large" else ""}
            if fresh:
                break
        return {"error": "gone", "says": ""}

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        self.child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("worker.py")), *import_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            **operating_system.OWN_SESSION,
        )
        line = json.dumps({"memory_bytes": MEMORY_BYTES}).encode() + b"\n"
        if not _exchange(self.child, line, START_SECONDS)[0]:
            self.close()
            raise MissingResourceError(
                "the process that chat templates run in does not start; it needs Jinja: pip install jinja2"
            )
        return self.child


def import_folders() -> list[str]:
    """Return the folders that the child imports from, which may be known to this process alone (PYTHONPATH)."""
    specs = [find_spec(name) for name in ("smolforge", "jinja2")]
    return [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin is not None]


def _exchange(child: subprocess.Popen[bytes], line: bytes, seconds: float) -> tuple[bytes, str]:
    """Write a line and return the next one, and an error that the child was killed for.

    The line is empty where the child ends instead.
    """
    assert child.stdin and child.stdout
    answered, killed_as = threading.Event(), list[str]()
    limits = {"seconds": seconds, "killed_as": killed_as}
    threading.Thread(target=_watch, args=(child, answered), kwargs=limits, daemon=True).start()
    answer, unsent = b"", memoryview(line)
    try:
        while unsent:
            unsent = unsent[child.stdin.write(unsent) :]
        while not answer.endswith(b"\n") and (piece := child.stdout.read(1 << 20)):
            answer += piece
    except OSError as error:
        if not operating_system.is_broken_pipe(error):
            raise
    finally:
        answered.set()
    return answer if answer.endswith(b"\n") else b"", "".join(killed_as)


def _watch(child: subprocess.Popen[bytes], answered: threading.Event, *, seconds: float, killed_as: list[str]) -> None:
    """Kill a child that does not answer in time, or takes too much memory where the system sets no limit."""
    deadline = time.monotonic() + seconds
    while not answered.wait(seconds if operating_system.HAS_RESOURCE_LIMITS else WATCH_SECONDS):
        late = time.monotonic() >= deadline
        if late or operating_system.memory_bytes(child.pid) > MEMORY_BYTES + START_BYTES:
            killed_as.append("late" if late else "large")
            child.kill()
            return


def _close_pipes(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe:
            pipe.close()


WORKER = Worker()
atexit.register(WORKER.close)
operating_system.call_after_fork(WORKER.forget)
