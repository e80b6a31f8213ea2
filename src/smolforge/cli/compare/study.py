"""`smolforge compare STUDY.toml`: run a study, show its progress, print its results."""

import os
from pathlib import Path
from typing import Any

from smolforge.cli import one_line
from smolforge.cli.compare import report_lines, write_into
from smolforge.cli.run_display import Display
from smolforge.comparison.study import run_variants
from smolforge.comparison.study.report import failed_runs, results_json, results_table, write_report
from smolforge.comparison.study.runner import StudyListener
from smolforge.comparison.study.spec import read_study
from smolforge.config import Recipe
from smolforge.device.environment import describe_environment
from smolforge.runs.estimate import RunEstimate
from smolforge.training.loop import TrainState
from smolforge.training.signals import stop_signals


class StudyDisplay(StudyListener):
    """Show each run of a study with its number; a plan that many runs share is shown once."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.printed_shapes: set[tuple[str, ...]] = set()

    def on_run_start(self, name: str, number: int, total: int) -> None:
        self.display.stop()
        self.display.print_line(f"run {number} of {total}: {name}")

    def on_measure_start(self, what: str) -> None:
        self.display.stop()
        self.display.print_line(f"measuring {what} of each variant")

    def on_plan(self, recipe: Recipe, estimate: RunEstimate, start: TrainState) -> None:
        shape = (str(recipe.model), str(recipe.optim), str(start.step))
        console = self.display.console
        quiet, console.quiet = console.quiet, console.quiet or shape in self.printed_shapes
        self.display.on_plan(recipe, estimate, start)
        console.quiet = quiet
        self.printed_shapes.add(shape)

    def on_prepare(self, counts: dict[str, int], source: str = "") -> None:
        self.display.on_prepare(counts, source)

    def on_reference(self, pairs: int, total: int) -> None:
        self.display.on_reference(pairs, total)

    def on_step(self, metrics: dict[str, Any]) -> None:
        self.display.on_step(metrics)


def compare_study(name_or_path: str, out: Path, as_json: bool) -> None:
    """Run the study in a file, resume what is in `out`, and print the results."""
    spec = read_study(name_or_path)
    with stop_signals(), Display(quiet=as_json) as display:
        outcome = run_variants(spec, out, StudyDisplay(display), environment=describe_environment(os.environ))
    files = write_into(out, lambda: write_report(outcome, out))
    if as_json:
        print(results_json(outcome), end="")
        return
    print("\n".join(report_lines(results_table(outcome))))
    for shortfall in failed_runs(outcome):
        print(f"not finished: {one_line(shortfall)}")
    print(f"\n{files[0]} has the figures and what each variant cost")
