"""Metrics under the names that trackers show, and events as one row per step."""

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
"""Prefix of a metric's name -> its group in the tracker."""
GLOBAL_STEP = "train/global_step"
"""The name that Transformers' Trainer uses."""


def tag(metric: str) -> str:
    """`validation_loss` as `validation/loss`, `mfu` as `speed/mfu`, `loss` as `train/loss`, `a/b` as it is."""
    if "/" in metric:
        return metric
    start, group = next(((start, group) for start, group in GROUPS.items() if metric.startswith(start)), ("", "train"))
    return f"{group}/{metric.removeprefix(start) if group in ('validation', 'tasks', 'seconds', 'mixture') else metric}"


def values(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among a step's metrics, by tag; None, which files have for NaN, is NaN."""
    return {
        tag(name): float("nan") if value is None else float(value)
        for name, value in metrics.items()
        if name != "step" and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
    }


class StepRows:
    """Logs one row per step: its values, and the samples, histograms and incidents of the step.

    Rows are numbered by the steps that were computed, so a step that a rewind repeats has a new number and nothing is
    overwritten; the row contains the step. Rows up to the number `last_logged` exist from an earlier start.
    """

    def __init__(
        self,
        log: Callable[[dict[str, Any], int], object],
        last_logged: int,
        repeated_steps: int,
        *,
        table: Callable[[list[str], list[list[Any]]], object],
        histogram: Callable[[tuple[Any, Any]], object],
    ) -> None:
        self.log, self.last_logged, self.repeated_steps = log, last_logged, repeated_steps
        self.table, self.histogram = table, histogram
        self.row: dict[str, Any] = {}
        self.samples: list[list[Any]] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Rewound():
                self.repeated_steps = event.repeated_steps
                self.row, self.samples = {key: value for key, value in self.row.items() if key == "incident"}, []
            case Sampled():
                self.samples.append([event.step, event.prompt, event.text])
            case Watched():
                self.row |= {name: self.histogram(tuple(histogram)) for name, histogram in event.histograms.items()}
            case Incident():
                self.row["incident"] = f"{event.record['kind']}: {event.record['reason']}"
            case Stepped():
                self.step(event.metrics)
            case _:
                pass

    def step(self, metrics: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl, with the other events of its step."""
        row = {GLOBAL_STEP: metrics["step"], **values(metrics), **self.row}
        if self.samples:
            row["samples"] = self.table(["step", "prompt", "text"], self.samples)
        self.row, self.samples = {}, []
        number = metrics["step"] + self.repeated_steps
        if number > self.last_logged:
            self.log(row, number)
