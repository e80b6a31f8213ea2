"""The quickstart, with a model that takes a second: what it says is what happened."""

import json
import signal
from pydoc_data.topics import topics

import pytest
from conftest import NANO

from smolforge import atomic, cli
from smolforge.checkpoint import training_state
from smolforge.cli.quickstart import lifecycle
from smolforge.cli.run_display import Display
from smolforge.errors import Stopped
from smolforge.training.run_folder import read_records


@pytest.fixture
def recipe(tmp_path) -> str:
    """On a tenth of the documentation, which is prose like the rest: the tokenizer and xz read all that is given."""
    (tmp_path / "docs").mkdir()
    for name, text in list(topics.items())[:24]:
        (tmp_path / "docs" / f"{name.replace('/', '-')}.txt").write_text(text)
    path = tmp_path / "tiny.json"
    data = {"sources": [str(tmp_path / "docs")], "held_out": 0.2}
    path.write_text(json.dumps(NANO | {"model": NANO["model"] | {"vocab_size": 400}, "data": data}))
    return str(path)


@pytest.mark.heavy
def test_quickstart_trains_resumes_exactly_and_scores(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(lifecycle, "tokens_per_second", lambda recipe: 50 * 128.0)
    out = tmp_path / "out"
    with Display(quiet=True) as show:
        summary = lifecycle.run_quickstart(out, 1, show, recipe=recipe)
    assert summary["steps"] == 50
    assert summary["resume"] == {**summary["resume"], "from": "step-00000025", "to": "step-00000050", "equal": True}
    starts = json.loads((out / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 25]
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == list(range(1, 51))
    assert "stopped by SIGINT after step 25" in (out / "run.log").read_text()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["xz_primed_bits_per_byte"] < summary["xz_bits_per_byte"] < 3 < summary["bits_per_byte"] < 6
    lines = lifecycle.score_lines(summary)
    assert lines.count("not beaten") == 2
    assert lifecycle.score_lines(summary | {"bits_per_byte": 1.0}).count("(beaten)") == 2

    monkeypatch.setattr(lifecycle, "prove_resume", lambda out: summary["resume"])  # which takes a process
    lifecycle.run_quickstart(out, 1, show, recipe=recipe)
    weights = atomic.read_manifest(out / "checkpoints" / "step-00000050")["files"]["model.safetensors"]
    assert weights["sha256"] == summary["resume"]["sha256"]["model.safetensors"]
    assert len(json.loads((out / "environment.json").read_text())) == 3


def test_quickstart_reports_an_inexact_resume(tmp_path, monkeypatch, capsys):
    proof = {"from": "a", "to": "b", "sha256": {"model.safetensors": "00"}, "equal": False}
    assert "NOT equal" in lifecycle.proof_lines(proof)
    monkeypatch.setattr(lifecycle, "run_quickstart", lambda *_, **__: {"resume": proof})
    assert cli.run(["quickstart", "--out", str(tmp_path), "--json"]) == 1
    assert training_state.list_checkpoints(tmp_path) == []
    assert json.loads(capsys.readouterr().out)["resume"]["equal"] is False


def test_quickstart_stops_on_ctrl_c_of_the_user(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(lifecycle, "tokens_per_second", lambda recipe: 50 * 128.0)
    with Display(quiet=True) as show, pytest.raises(Stopped, match="after step 3"):
        show.listeners.append(lambda metrics: signal.raise_signal(signal.SIGINT) if metrics["step"] == 3 else None)
        lifecycle.run_quickstart(tmp_path / "out", 1, show, recipe=recipe)
