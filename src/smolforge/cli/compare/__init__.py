"""`smolforge compare`, and the table of runs that `inspect` shows as well."""

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smolforge.errors import MissingResource, SettingError
from smolforge.training.signals import stop_signals


def compare(
    *what: str,
    out: Path = Path("comparison"),
    json_: Annotated[bool, Parameter(name="--json")] = False,
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
        raise SettingError("compare needs RUN... or STUDY: run folders, a folder of runs, or a study's file")
    with stop_signals():  # also while the imports take their seconds
        from smolforge.cli.compare.study import study

        studied = is_study(what)
    if studied:
        study(what[0], out, json_)
        return
    from smolforge.comparison.page import write
    from smolforge.comparison.select import select
    from smolforge.comparison.table import rows

    selection = select([Path(each) for each in what])
    if not selection.runs:
        raise SettingError(f"no run can be read there: {next(iter(selection.broken.values()))}")
    if out.exists() and not out.is_dir():
        raise SettingError(f"--out {out} is a file; it should be a folder, which is made where there is none")
    try:
        files = write(selection, out)
    except OSError as error:
        raise MissingResource(f"{error.filename or out} could not be written: {error.strerror}") from None
    if json_:
        print(json.dumps({"runs": [row.as_json() for row in rows(selection)], "files": [str(file) for file in files]}))
        return
    show(rows(selection))
    print(f"\n{files[0]} has the figures, the samples and the settings")


def is_study(what: Sequence[str]) -> bool:
    """Whether a study is meant: one file of settings, or the name of a shipped one where no run is called so."""
    from smolforge.config.load import FOLDERS, PARSERS, find

    if len(what) != 1 or Path(what[0]).is_dir():
        return False
    if Path(what[0]).suffix in PARSERS:
        return True
    with suppress(SettingError):
        return find(what[0], "study").parent.name == FOLDERS["study"]
    return False


def runs_named(what: str, more: Sequence[str]) -> list[str]:
    """The folders that `inspect` was given, where they are several, or one that holds runs; else none."""
    from smolforge.comparison.select import holds_runs

    names = [what, *takewhile(lambda word: not word.startswith("--"), more)]
    several = len(names) > 1 and any(Path(name).is_dir() for name in names)
    if not several and not (Path(what).is_dir() and holds_runs(Path(what))):
        return []
    if flags := more[len(names) - 1 :]:
        raise SettingError(f"settings such as {flags[0]} are for recipes; {what} is none")
    return names


def inspect_runs(folders: Sequence[str], as_json: bool) -> None:
    """Print the table of some runs."""
    from smolforge.comparison.select import select
    from smolforge.comparison.table import rows

    table = rows(select([Path(folder) for folder in folders]))
    if as_json:
        print(json.dumps({"runs": [row.as_json() for row in table]}))
    else:
        show(table)


def show(table: Sequence) -> None:
    """Print it, with nothing in it that a terminal would obey."""
    from smolforge.cli import one_line
    from smolforge.comparison.table import lines

    print("\n".join(lines(table, one_line)))
