"""The examples run, shortened, and write what they say."""

import importlib.util
import json
import re
import runpy
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


NOTEBOOK = json.loads((ROOT / "examples" / "first_model.ipynb").read_text("utf-8"))


def test_notebook_is_valid_and_was_run():
    """nbformat 4.5, its cells run in order, their figures kept, and nothing of the machine that ran them."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    names = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(names)) == len(names)
    codes = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in codes for output in cell["outputs"]) == 3
    assert not re.search(r"/(tmp|home|root|work|Users)/", json.dumps(NOTEBOOK))


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
