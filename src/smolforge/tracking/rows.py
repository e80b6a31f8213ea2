"""Metrics under the names that trackers show, and events as one row a step."""

from collections.abc import Callable
from typing import Any

from smolforge.tracking import Event, Incident, Rewound, Sampled, Stepped, Watched

GROUPS = {
    "validation_": "validation",
    "task_": "tasks",
    "seconds_": "seconds",
    "tokens_from_": "mixture",
    "tokens_per_second": "speed",
    "mfu": "speed",
}
GROUPS |= dict.fromkeys(("joules_", "peak_memory", "memory_", "cpu_", "machine_", "gpu_"), "machine")
"""Beginning of a metric's name -> where it is shown."""
GLOBAL_STEP = "train/global_step"
"""What Transformers' trainer calls it there."""


def tag(metric: str) -> str:
    """`validation_loss` as `validation/loss`, `mfu` as `speed/mfu`, `loss` as `train/loss`, `a/b` as it is."""
    if "/" in metric:
        return metric
    start, group = next(((start, group) for start, group in GROUPS.items() if metric.startswith(start)), ("", "train"))
    return f"{group}/{metric.removeprefix(start) if group in ('validation', 'tasks', 'seconds', 'mixture') else metric}"


def values(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers among a step's metrics, by tag; null is what a file has for one that is none."""
    return {
        tag(name): float("nan") if value is None else float(value)
        for name, value in metrics.items()
        if name != "step" and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
    }


class Rows:
    """Hands on one row a step: its values, and what was drawn, watched or went wrong at it.

    Rows are numbered by the steps that were computed, so a step that a rewind makes run again has a new number and
    nothing is overwritten; the step stands in the row. Rows up to the number `known` are there from an earlier start.
    """

    def __init__(
        self,
        log: Callable[[dict[str, Any], int], object],
        known: int,
        again: int,
        table: Callable[[list[str], list[list[Any]]], object],
        histogram: Callable[[tuple[Any, Any]], object],
    ) -> None:
        self.log, self.known, self.again = log, known, again
        self.table, self.histogram = table, histogram
        self.row: dict[str, Any] = {}
        self.samples: list[list[Any]] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Rewound():
                self.again = event.again
                self.row, self.samples = {key: said for key, said in self.row.items() if key == "incident"}, []
            case Sampled():
                self.samples.append([event.step, event.prompt, event.text])
            case Watched():
                self.row |= {name: self.histogram(tuple(each)) for name, each in event.histograms.items()}
            case Incident():
                self.row["incident"] = f"{event.record['kind']}: {event.record['reason']}"
            case Stepped():
                self.step(event.metrics)
            case _:
                pass

    def step(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl, with what was gathered for it."""
        row = {GLOBAL_STEP: metrics["step"], **values(metrics), **self.row}
        if self.samples:
            row["samples"] = self.table(["step", "prompt", "text"], self.samples)
        self.row, self.samples = {}, []
        number = metrics["step"] + self.again
        if number > self.known:
            self.log(row, number)
