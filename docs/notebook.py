"""Run examples/first_model.ipynb and keep what its cells print and draw: `python docs/notebook.py`.

cells of code -> run in order in one scratch folder -> their text and figures, as a notebook keeps them
"""

import base64
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_model.ipynb"
DOTS_PER_INCH = 80


def executed(notebook: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same notebook with the outputs of its cells, run in this folder."""
    matplotlib.use("agg")
    session: dict[str, Any] = {"__name__": "__main__"}
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with contextlib.chdir(folder):
        for number, cell in enumerate(codes, start=1):
            cell["execution_count"], cell["outputs"] = number, outputs("".join(cell["source"]), session)
    return notebook


def outputs(source: str, session: dict[str, Any]) -> list[dict[str, Any]]:
    """What a cell prints, and the figure it leaves."""
    from matplotlib import pyplot

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(source, NOTEBOOK.name, "exec"), session)
    made: list[dict[str, Any]] = []
    if said.getvalue():
        made.append({"output_type": "stream", "name": "stdout", "text": said.getvalue().splitlines(keepends=True)})
    for figure in map(pyplot.figure, pyplot.get_fignums()):
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=DOTS_PER_INCH, bbox_inches="tight", metadata={"Software": None})
        image = base64.b64encode(drawn.getvalue()).decode()
        made.append({"output_type": "display_data", "data": {"image/png": image}, "metadata": {}})
    pyplot.close("all")
    return made


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it: docs/performance.md
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(json.loads(NOTEBOOK.read_text("utf-8")), Path(folder))
    NOTEBOOK.write_text(json.dumps(notebook, indent=1) + "\n", "utf-8")
