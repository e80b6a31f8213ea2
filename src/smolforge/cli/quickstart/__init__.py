"""`smolforge quickstart`."""

import json
from pathlib import Path


def quickstart(
    out: Path = Path("quickstart"),
    *,
    seconds: int = 130,
    json_: bool = False,
) -> int:
    """The whole life of a small model on this machine, offline, in about three minutes.

        smolforge quickstart --out first-model

    Parameters
    ----------
    out
        Folder for everything it makes.
    seconds
        Time to train; the rest takes about one minute more.
    json_
        Print the summary as one JSON object.
    """
    from smolforge.cli.quickstart.lifecycle import run_quickstart
    from smolforge.cli.run_display import Display

    with Display(quiet=json_) as show:
        summary = run_quickstart(out, seconds, show)
    if json_:
        print(json.dumps(summary))
    return 0 if summary["resume"]["equal"] else 1
