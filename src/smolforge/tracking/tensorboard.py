"""Write events to TensorBoard's files, in RUN/tensorboard: one file for each start.

There is no thread and no buffer: the operating system has each step's records before the next step starts, so a kill
loses nothing. A file starts by purging the later steps of the file before, so TensorBoard shows each step once.
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
    """A tracker that writes one event file."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)
        self.records = RecordWriter(self)
        self.write_record(Record(file_version="brain.Event:2"))
        self.rewind = ""

    def write(self, data: bytes) -> None:
        """Write the bytes of a record. Raises OSError if the disk is full: readers would stop at a partial record."""
        try:
            if self.file.write(data) != len(data):
                raise OSError("the disk has no room for TensorBoard's events")
        except OSError:
            self.file.close()
            raise

    def write_record(self, record: Record) -> None:
        record.wall_time = time.time()
        self.records.write(record.SerializeToString())

    def add_summary(self, step: int, summaries: Iterable[Summary.Value]) -> None:
        self.write_record(Record(step=step, summary=Summary(value=summaries)))

    def purge_after(self, step: int) -> None:
        """Purge the records of all later steps."""
        self.write_record(Record(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                for name, content in (("recipe", event.recipe.model_dump(mode="json")), ("machine", event.environment)):
                    self.add_summary(event.step + 1, text_summary(name, as_code_block(json.dumps(content, indent=2))))
            case Rewound():
                self.purge_after(event.step)
                self.add_summary(event.step, text_summary("incidents", self.rewind))
            case Stepped():
                self.add_summary(event.metrics["step"], scalar_summaries(event.metrics))
            case Sampled():
                self.add_summary(
                    event.step, text_summary(f"samples/{event.number}", as_code_block(event.prompt + event.text))
                )
            case Watched():
                self.add_summary(
                    event.step, [histogram_summary(name, spread) for name, spread in event.histograms.items()]
                )
            case Incident():
                message = f"{event.record['kind']}: {event.record['reason']}"
                self.add_summary(event.record["step"], text_summary("incidents", message))
                self.rewind = f"{message}; back from step {event.record['step']}"
            case Ended():
                self.file.close()
            case _:
                pass


def create_tracker(started: Started) -> TensorBoard:
    """Open a file for a start; the first one gets all earlier steps of the run."""
    folder = started.folder / TENSORBOARD
    folder.mkdir(exist_ok=True)
    existing = sorted(folder.glob("events.out.tfevents.*"))
    tracker = TensorBoard(folder / next_file_name(existing[-1].name if existing else None))
    tracker.purge_after(started.step)  # also the first: its server takes the first such record for no restart
    for metrics in () if existing else started.history():
        tracker(Stepped(metrics))
    return tracker


def next_file_name(last: str | None) -> str:
    """Return a file name that TensorBoard reads after the last one, whatever the clock says."""
    seconds = int(time.time())
    if last is not None:
        seconds = max(seconds, int(last.split(".")[3]) + 1)
    return f"events.out.tfevents.{seconds:010}.{socket.gethostname()}"


def scalar_summaries(metrics: dict[str, Any]) -> list[Summary.Value]:
    return [Summary.Value(tag=tag, simple_value=value) for tag, value in values(metrics).items()]


def text_summary(tag: str, content: str) -> list[Summary.Value]:
    return list(text_pb(tag, content).value)


def as_code_block(text: str) -> str:
    """Return Markdown that shows a text unchanged."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def histogram_summary(tag: str, spread: Histogram) -> Summary.Value:
    """Return a histogram for TensorBoard's plugin: rows of left edge, right edge and count."""
    rows = np.stack([spread.edges[:-1], spread.edges[1:], spread.counts], axis=1).astype(np.float64)
    metadata = create_summary_metadata(display_name=None, description=None)
    return Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(rows, dtype=np.float64))
