"""Run the notebooks of examples/ and keep what their cells print and draw: `python docs/notebook.py [NAME...]`.

cells of code -> run in order in one scratch folder -> their text and figures, as a notebook keeps them

Of IPython's own lines, `!command` runs a command with {variables} in it, and `%pip` does nothing here.
"""

import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib

EXAMPLES = Path(__file__).parents[1] / "examples"
DOTS_PER_INCH = 80


def executed(notebook: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same notebook with the outputs of its cells, run in this folder."""
    matplotlib.use("agg")
    session: dict[str, Any] = {"__name__": "__main__", "run_command": run_command}
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with contextlib.chdir(folder), mock.patch.dict(os.environ, PATH=path):
        for number, cell in enumerate(codes, start=1):
            cell["execution_count"], cell["outputs"] = number, outputs("".join(cell["source"]), session)
    return notebook


def outputs(source: str, session: dict[str, Any]) -> list[dict[str, Any]]:
    """What a cell prints, and the figure it leaves."""
    from matplotlib import pyplot

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(plain_python(source), "cell", "exec"), session)
    text, made = said.getvalue().replace(str(Path.cwd()), "/content"), list[dict[str, Any]]()
    if text:
        made.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    for figure in map(pyplot.figure, pyplot.get_fignums()):
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=DOTS_PER_INCH, bbox_inches="tight", metadata={"Software": None})
        image = base64.b64encode(drawn.getvalue()).decode()
        made.append({"output_type": "display_data", "data": {"image/png": image}, "metadata": {}})
    pyplot.close("all")
    return made


def plain_python(source: str) -> str:
    """A cell without IPython's own lines."""
    source = re.sub(r"^( *)!(.+)$", r'\1run_command(f"""\2 """)', source, flags=re.MULTILINE)
    return re.sub(r"^( *)%pip .+$", r"\1pass", source, flags=re.MULTILINE)


def run_command(command: str) -> None:
    """Run a command, and print what it says."""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, end="")


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it: docs/performance.md
    for path in [EXAMPLES / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(json.loads(path.read_text("utf-8")), Path(folder))
        path.write_text(json.dumps(notebook, indent=1) + "\n", "utf-8")
