"""Events to TensorBoard's files, in RUN/tensorboard: a file for each start, written as it happens.

No thread and no buffer: what is said of a step is with the system before the next begins, so a kill loses nothing. A
file opens by taking back what the one before said of later steps, so TensorBoard has each step once.
"""

import json
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event as Record
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.metadata import create_summary_metadata
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from smolforge.tracking import Ended, Event, Histogram, Incident, Rewound, Sampled, Started, Stepped, Watched
from smolforge.tracking.rows import values
from smolforge.training.run_folder import TENSORBOARD


class TensorBoard:
    """Writes one file of events."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)
        self.records = RecordWriter(self)
        self.put(Record(file_version="brain.Event:2"))
        self.rewind = ""

    def write(self, data: bytes) -> None:
        """A record, as the system takes it. Raises OSError where that is not whole: a reader would stop there."""
        try:
            if self.file.write(data) != len(data):
                raise OSError("the disk has no room for TensorBoard's events")
        except OSError:
            self.file.close()
            raise

    def put(self, record: Record) -> None:
        record.wall_time = time.time()
        self.records.write(record.SerializeToString())

    def say(self, step: int, said: Iterable[Summary.Value]) -> None:
        self.put(Record(step=step, summary=Summary(value=said)))

    def take_back(self, step: int) -> None:
        """What was said of steps after this one does not count any more."""
        self.put(Record(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                for name, told in (("recipe", event.recipe.model_dump(mode="json")), ("machine", event.environment)):
                    self.say(event.step + 1, text(name, as_it_is(json.dumps(told, indent=2))))
            case Rewound():
                self.take_back(event.step)
                self.say(event.step, text("incidents", self.rewind))
            case Stepped():
                self.say(event.metrics["step"], scalars(event.metrics))
            case Sampled():
                self.say(event.step, text(f"samples/{event.number}", as_it_is(event.prompt + event.text)))
            case Watched():
                self.say(event.step, [histogram(name, each) for name, each in event.histograms.items()])
            case Incident():
                said = f"{event.record['kind']}: {event.record['reason']}"
                self.say(event.record["step"], text("incidents", said))
                self.rewind = f"{said}; back from step {event.record['step']}"
            case Ended():
                self.file.close()
            case _:
                pass


def begin(started: Started) -> TensorBoard:
    """A file for a start; the first one gets what the run did before it was told to TensorBoard."""
    folder = started.folder / TENSORBOARD
    folder.mkdir(exist_ok=True)
    there = sorted(folder.glob("events.out.tfevents.*"))
    tracker = TensorBoard(folder / name_after(there[-1].name if there else None))
    tracker.take_back(started.step)  # also the first: its server takes the first such record for no restart
    for metrics in () if there else started.history():
        tracker(Stepped(metrics))
    return tracker


def name_after(last: str | None) -> str:
    """A name that TensorBoard reads after the last one, whatever the clock says."""
    seconds = int(time.time())
    if last is not None:
        seconds = max(seconds, int(last.split(".")[3]) + 1)
    return f"events.out.tfevents.{seconds:010}.{socket.gethostname()}"


def scalars(metrics: dict[str, Any]) -> list[Summary.Value]:
    return [Summary.Value(tag=tag, simple_value=value) for tag, value in values(metrics).items()]


def text(tag: str, said: str) -> list[Summary.Value]:
    return list(text_pb(tag, said).value)


def as_it_is(said: str) -> str:
    """Markdown that shows a text with its own lines and signs."""
    return "\n".join(f"    {line}" for line in said.split("\n"))


def histogram(tag: str, spread: Histogram) -> Summary.Value:
    """As TensorBoard's histogram plugin keeps it: rows of left edge, right edge and count."""
    rows = np.stack([spread.edges[:-1], spread.edges[1:], spread.counts], axis=1).astype(np.float64)
    metadata = create_summary_metadata(display_name=None, description=None)
    return Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(rows, dtype=np.float64))
