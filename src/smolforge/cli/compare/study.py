"""`smolforge compare STUDY.toml`: a study as people watch it, and what came of it in a table."""

import os
from pathlib import Path
from typing import Any

from smolforge.cli import one_line
from smolforge.cli.run_display import Display
from smolforge.comparison.study import conduct
from smolforge.comparison.study.report import numbers, results, shortfalls, write
from smolforge.comparison.study.spec import read
from smolforge.config import Recipe
from smolforge.device.environment import surroundings
from smolforge.errors import MissingResource
from smolforge.runs.estimate import Plan
from smolforge.training.loop import State
from smolforge.training.signals import stop_signals


class Watching:
    """Shows each run of a study, which of how many it is, and what is the same in many of them once."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.told: set[tuple[str, ...]] = set()

    def beginning(self, name: str, number: int, of: int) -> None:
        self.display.stop()
        self.display.say(f"run {number} of {of}: {name}")

    def measuring(self, what: str) -> None:
        self.display.stop()
        self.display.say(f"measuring {what} of each variant")

    def planned(self, recipe: Recipe, plan: Plan, start: State) -> None:
        shape = (str(recipe.model), str(recipe.optim), str(start.step))
        console = self.display.console
        quiet, console.quiet = console.quiet, console.quiet or shape in self.told
        self.display.planned(recipe, plan, start)
        console.quiet = quiet
        self.told.add(shape)

    def preparing(self, counts: dict[str, int], source: str = "") -> None:
        self.display.preparing(counts, source)

    def referring(self, pairs: int, of: int) -> None:
        self.display.referring(pairs, of)

    def stepped(self, metrics: dict[str, Any]) -> None:
        self.display.stepped(metrics)

    def sampled(self, text: str) -> None:
        """Texts are in the runs."""


def study(what: str, out: Path, as_json: bool) -> None:
    """Conduct the study in a file, from wherever it stands in `out`, and show what came of it."""
    chosen = read(what)
    with stop_signals(), Display(quiet=as_json) as display:
        found = conduct(chosen, out, Watching(display), surroundings(os.environ))
    try:
        files = write(found, out)
    except OSError as error:
        raise MissingResource(f"{error.filename or out} could not be written: {error.strerror}") from None
    if as_json:
        print(numbers(found), end="")
        return
    print("\n".join(aligned([results(found).head, *results(found).rows])))
    for said in shortfalls(found):
        print(f"not finished: {one_line(said)}")
    print(f"\n{files[0]} has the figures and what each variant cost")


def aligned(cells: list[list[str]]) -> list[str]:
    """Rows as lines; the first and last column are words."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<", *(">" for _ in widths[2:]), "<"]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in cells
    ]
