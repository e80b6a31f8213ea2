"""Whoever hears of a run beside its own files: TensorBoard, W&B, Trackio.

events ->  Trackers  ->  one adapter each, made when the run starts
             one that fails is said once and left out; training never stops for it
"""

import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from smolforge import commit
from smolforge.errors import InvalidFile, MissingResource
from smolforge.runs import TRACKING
from smolforge.tracking.events import Ended, Event, Started

log = logging.getLogger("smolforge")

Tracker = Callable[[Event], None]
Maker = Callable[[Started], Tracker]


class Trackers:
    """Passes events on to those that were asked for."""

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self.makers, self.listening = makers, dict[str, Tracker]()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            for name, make in self.makers.items():
                with self._left_out_if_it_fails(name):
                    self.listening[name] = make(event)
        for name, tracker in list(self.listening.items()):
            with self._left_out_if_it_fails(name):
                tracker(event)

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.listening.pop(name, None)
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            log.warning("%s hears no more of this run: %s. Training goes on; metrics.jsonl has all", name, reason)

    def end(self, state: str, reason: str) -> None:
        """Tell them, and let them go."""
        self(Ended(state, reason))
        self.listening.clear()


def trackers(names: tuple[str, ...] | None) -> Trackers:
    """Those of `report.to`. Raises MissingResource for one that is not installed."""
    for name in names or ():
        if find_spec(name) is None:
            raise MissingResource(f"report.to has {name}, which is not installed: pip install 'smolforge[{name}]'")
    return Trackers({name: import_maker(name) for name in dict.fromkeys(names or ())})


def import_maker(name: str) -> Maker:
    """The adapter's module, loaded when the run starts: each brings in a large library."""
    return lambda started: import_module(f"smolforge.tracking.{name}").begin(started)


def identity(folder: Path) -> str:
    """The id of a run where others keep it, made once and kept in its folder. Raises InvalidFile where it is lost."""
    path = folder / TRACKING
    if not path.is_file():
        commit.replace(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
    try:
        return json.loads(path.read_text("utf-8"))["id"]
    except (ValueError, TypeError, KeyError):
        raise InvalidFile(f"{path} has no id; without that file the run gets a new one") from None
