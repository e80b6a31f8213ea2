"""The examples run, shortened, and write what they say."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_positions(tmp_path, monkeypatch):
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
