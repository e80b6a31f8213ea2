"""`smolforge compare`, and the table of runs that `inspect` shows as well."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from smolforge.cli.table import print_result, table_lines
from smolforge.errors import ConfigError, MissingResourceError
from smolforge.training.signals import stop_signals


def compare(
    *what: str, out: Path = Path("comparison"), json_: Annotated[bool, Parameter(name="--json")] = False
) -> None:
    """Runs side by side, or ideas by a study: a table, figures for print, one page.

    A study is a TOML file with variants of a recipe, seeds, and a budget that is held equal. Its runs are trained
    into OUT/runs one after the other; the same command goes on where it was stopped.

        smolforge compare runs/mine --out report

    Parameters
    ----------
    what
        Run folders, or folders of runs; one that is being trained shows what it has so far. Or one study, as a file
        or by the name of one that comes with smolforge.
    out
        Where index.html and the figures go, each as SVG and PNG; of a study its runs and numbers too.
    json_
        Print the table as one JSON object, with the files that were written; of a study, all its numbers.
    """
    if not what:
        raise ConfigError("compare needs RUN... or STUDY: run folders, a folder of runs, or a study's file")
    with stop_signals():  # also while the imports take their seconds
        from smolforge.cli.compare.study import compare_study

        study_named = is_study(what)
    if study_named:
        compare_study(what[0], out, json_)
        return
    compare_runs([Path(path) for path in what], out, json_)


def compare_runs(folders: Sequence[Path], out: Path, as_json: bool) -> None:
    """Write the page and the figures of some runs, and print their table."""
    from smolforge.comparison.history import select
    from smolforge.comparison.summaries import table_rows, write_report

    selection = select(folders)
    if not selection.runs:
        raise ConfigError(f"no run can be read there: {next(iter(selection.broken.values()))}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; it should be a folder, which is made where there is none")
    files = write_into(out, lambda: write_report(selection, out))
    print_runs(table_rows(selection), as_json, files=[str(file) for file in files])
    if not as_json:
        print(f"\n{files[0]} has the figures, the samples and the settings")


def write_into(out: Path, write: Callable[[], list[Path]]) -> list[Path]:
    """Write files into a folder. Raises MissingResourceError where that fails."""
    try:
        return write()
    except OSError as error:
        raise MissingResourceError(f"{error.filename or out} could not be written: {error.strerror}") from None


def is_study(names: Sequence[str]) -> bool:
    """Return whether a study is meant: one settings file, or the name of a shipped study where no run has that name."""
    from smolforge.config.load import FOLDERS, PARSERS, find_recipe

    if len(names) != 1 or Path(names[0]).is_dir():
        return False
    if Path(names[0]).suffix in PARSERS:
        return True
    with suppress(ConfigError):
        return find_recipe(names[0], "study").parent.name == FOLDERS["study"]
    return False


def run_folders_named(first: str, more: Sequence[str]) -> list[str]:
    """Return the run folders given to `inspect`: several, or one that has runs in it; else an empty list."""
    from smolforge.comparison.history import holds_runs

    names = [first, *takewhile(lambda argument: not argument.startswith("--"), more)]
    several = len(names) > 1 and any(Path(name).is_dir() for name in names)
    if not several and not (Path(first).is_dir() and holds_runs(Path(first))):
        return []
    if flags := more[len(names) - 1 :]:
        raise ConfigError(f"settings such as {flags[0]} are for recipes; {first} is none")
    return names


def inspect_runs(folders: Sequence[str], as_json: bool) -> None:
    """Print the table of some runs."""
    from smolforge.comparison.history import select
    from smolforge.comparison.summaries import table_rows

    print_runs(table_rows(select([Path(folder) for folder in folders])), as_json)


def print_runs(rows: Sequence, as_json: bool, **more: Any) -> None:
    """Print a table of runs, or one JSON object with something `more`."""
    from smolforge.comparison.summaries import runs_table

    print_result({"runs": [asdict(row) for row in rows], **more}, report_lines(runs_table(rows)), as_json=as_json)


def report_lines(table: Any) -> list[str]:
    """Return a table of a report as lines, without control characters."""
    from smolforge.cli import one_line

    align = "".join("<" if not number or name in table.text_columns else ">" for number, name in enumerate(table.head))
    return table_lines([[one_line(cell) for cell in row] for row in table.rows], table.head, align)
