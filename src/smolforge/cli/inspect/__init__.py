"""`smolforge inspect`."""

import sys
from pathlib import Path

from smolforge.cli.overrides import RecipeSettings, parse_overrides
from smolforge.errors import ConfigError


def inspect(
    what: str,
    *settings: RecipeSettings,
    tasks: str | None = None,
    figure: Path | None = None,
    report: Path | None = None,
    json_: bool = False,
) -> None:
    """What a model, recipe, corpus or run is, and what it will need.

        smolforge inspect runs/mine

    Parameters
    ----------
    what
        A model folder, .gguf, preset or Hub id, recipe, prepared corpus, run folder, or the word machine. A recipe
        takes the same dotted flags as train. Several runs, or a folder of runs, are shown as a table.
    tasks
        Of a corpus: say how many items of these tasks, named as for evaluate, share 13 words in a row with it.
    figure
        Of a corpus: draw how long its documents are into this .png, .svg or .pdf file.
    report
        Of the word machine: try it out for a minute, and write all that helps a maintainer into this .json file,
        without names, paths and variables of yours.
    json_
        Print it as one JSON object.
    """
    from smolforge.cli.compare import inspect_runs, run_folders_named
    from smolforge.cli.table import print_result

    if report is not None:
        if what != "machine" or settings:
            raise ConfigError(f"--report is for the word machine; {what} is none")
        inspect_machine(report, json_)
        return

    for flag, value in (("tasks", tasks), ("figure", figure)):
        if value is not None and not (Path(what) / "corpus.json").is_file():
            raise ConfigError(f"--{flag} is for a prepared corpus; {what} is none")
    if runs := run_folders_named(what, settings):
        inspect_runs(runs, json_)
        return
    overrides = parse_overrides(settings)
    from smolforge.cli.inspect import corpus
    from smolforge.cli.inspect.report import build_report, report_lines

    values = build_report(what, overrides)
    if tasks is not None:
        values["overlap"] = corpus.task_overlap(Path(what), tasks)
    if figure is not None:
        corpus.draw_histogram(Path(what), figure)
    print_result(values, () if json_ else report_lines(values), as_json=json_)


def inspect_machine(path: Path, json_: bool) -> None:
    """Write a report of this machine, and print it: nobody sends what they cannot read."""
    from smolforge.cli.inspect.machine import write_report
    from smolforge.cli.inspect.report import report_lines
    from smolforge.cli.table import print_result

    values = write_report(path, lambda name: print(f"{name} ...", file=sys.stderr, flush=True))
    lines = [*report_lines(values), "", f"{path} has this. To send it: docs/machines.md"]
    print_result(values, lines, as_json=json_)
