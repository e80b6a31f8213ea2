"""The examples run, shortened, and write what they say."""

import importlib.util
import json
import re
import runpy
import sys
import threading
import time
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_positions_example_writes_its_page(tmp_path, monkeypatch):
    positions = example("positions")
    monkeypatch.setattr(positions, "SHORT", 32)
    monkeypatch.setattr(positions, "LONG", 64)
    monkeypatch.setattr(positions, "EDGES", (0, 16, 32, 64))
    (tmp_path / "positions.md").write_text(f"Before.\n\n{positions.BEGIN}\nold\n{positions.END}\n\nAfter.\n")
    small = {"model.num_hidden_layers": 1, "model.vocab_size": 400, "train.batch_tokens": 128}
    small |= {"train.sequence_length": 32, "train.evaluate_every": None, "data.sources": [str(ROOT / "README.md")]}
    page = positions.main(20, tmp_path, small)
    assert "20 steps on rows of 32 tokens, then 2 more" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(positions.STYLES)
    assert len(re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", page)) == 3 * 4
    written = (tmp_path / "positions.md").read_text()
    assert written.startswith("Before.")
    assert written.endswith("After.\n")
    assert page in written
    assert "old" not in written
    assert (tmp_path / "positions.svg").read_text().lstrip().startswith("<?xml")


NOTEBOOKS = {path.stem: json.loads(path.read_text("utf-8")) for path in (ROOT / "examples").glob("*.ipynb")}
NOTEBOOK, ON_COLAB = NOTEBOOKS["first_model"], NOTEBOOKS["colab"]


def codes(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize(("name", "figures"), [("first_model", 3), ("colab", 0)])
def test_notebook_is_valid_and_was_run(name, figures):
    """nbformat 4.5, its cells run in order, their figures kept, and nothing of the machine that ran them."""
    notebook = NOTEBOOKS[name]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert [cell["execution_count"] for cell in codes(notebook)] == list(range(1, len(codes(notebook)) + 1))
    images = [output for cell in codes(notebook) for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(images) == figures
    assert not re.search(r"/(tmp|home|root|work|Users)/", json.dumps(notebook))


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("shortened", [True, pytest.param(False, marks=pytest.mark.long)])
def test_notebook_runs(tmp_path, shortened):
    generator = runpy.run_path(str(ROOT / "docs" / "notebook.py"))
    small = {"model.num_hidden_layers": 2, "model.vocab_size": 400, "train.batch_tokens": 256}
    short = f'steps=3, data="text.txt", **{small | {"train.sequence_length": 64}}'
    (tmp_path / "text.txt").write_text((ROOT / "docs" / "design.md").read_text("utf-8"))
    source = json.dumps(NOTEBOOK)
    if shortened:
        source = source.replace(json.dumps('budget="1m"')[1:-1], json.dumps(short)[1:-1])
        assert source != json.dumps(NOTEBOOK)
    cells = generator["executed"](json.loads(source), tmp_path)["cells"]
    made = [[*output.get("data", {"text": ""})] for cell in cells for output in cell.get("outputs", [])]
    assert made == [["text"], ["image/png"], ["text"], ["image/png"], ["image/png"]]


class Drive(types.ModuleType):
    """google.colab.drive: a mount that is lost as soon as the second session trains, until that has noticed."""

    def __init__(self, log):
        super().__init__("google.colab.drive")
        self.log = log

    def mount(self, path):
        drive, lost = Path(path, "MyDrive"), Path(path, "lost")
        drive.mkdir(parents=True)
        threading.Thread(target=self.disconnect, args=(drive, lost), daemon=True).start()

    def disconnect(self, drive, lost):
        self.wait_for("training from step [1-9]")
        drive.rename(lost)
        self.wait_for("NOT MIRRORED")
        lost.rename(drive)

    def wait_for(self, line):
        while not self.log.is_file() or not re.search(line, self.log.read_text()):
            time.sleep(0.001)


@pytest.mark.long
@pytest.mark.parametrize("place", ["colab", "laptop"])
def test_colab_notebook_loses_nothing(tmp_path, monkeypatch, place):
    """A session dies, Drive disconnects, and every file of the mirror is whole in the end."""
    (tmp_path / "text.txt").write_text((ROOT / "docs" / "design.md").read_text("utf-8"))
    short = "--train.steps 40 --train.checkpoint-every 2 --data.sources text.txt --model.num-hidden-layers 2 "
    short += "--model.vocab-size 400 --train.batch-tokens 512 --train.sequence-length 64"
    source = json.dumps(ON_COLAB).replace("--train.steps 60 --train.checkpoint-every 10", short)
    assert source != json.dumps(ON_COLAB)
    safe = tmp_path / "safe"
    if place == "colab":
        colab, safe = types.ModuleType("google.colab"), tmp_path / "drive" / "MyDrive"
        vars(colab)["drive"] = Drive(tmp_path / "first" / "run.log")
        monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        source = source.replace("/content/drive", str(tmp_path / "drive"))
    generator = runpy.run_path(str(ROOT / "docs" / "notebook.py"))
    cells = generator["executed"](json.loads(source), tmp_path)["cells"]
    said = {cell["id"]: "".join("".join(each["text"]) for each in cell.get("outputs", [])) for cell in cells}
    assert "dtype_reason" in said["machine"]
    assert re.search(r"^restored step \d+ from", said["resume"])
    assert ("works again; it has step" in said["resume"]) == (place == "colab")
    assert "finished: first is at step 40" in said["resume"]
    assert "all holds" in said["files"]
    assert said["words"]
    assert (safe / "first.gguf").is_file()
    assert steps_of(tmp_path / "first")[-1] == steps_of(safe / "first-mirror")[-1] == "step-00000040"


def steps_of(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())
