"""What commit e1a2559 wrote, the last one before names were changed, is still read, resumed and checked.

The files are in fixtures/before-rename, with the script that made them. Only the command line and the functions of the
package itself are used here, whose names stay.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import smolforge

FIXTURE = Path(__file__).parent / "fixtures" / "before-rename"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text("utf-8"))
FINGERPRINT = "e8ef8620d3b3b741e36ce0222c31b08d098b4ddd8e3f99a57da37d31b26e596b"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A copy of all files as the present folder, since their paths are relative to it."""
    shutil.copytree(FIXTURE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def records(run: str) -> list[dict]:
    """Return the metrics of each step of a run."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text("utf-8").splitlines()]


def command(*words: str) -> dict:
    """Return the JSON that a command prints."""
    done = subprocess.run([sys.executable, "-m", "smolforge", *words, "--json"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_old_run_resumes_with_the_same_losses():
    before = records("run")
    smolforge.train("run/recipe.toml", run="run", steps=28)
    after = records("run")
    assert after[:24] == before
    for record, expected in zip(after[24:], EXPECTED["steps"], strict=True):
        assert record["step"] == expected["step"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("model", EXPECTED["ids"])
def test_old_model_generates_the_same_tokens(model):
    (answer,) = smolforge.generate(smolforge.load(model), [EXPECTED["prompt"]], temperature=0, max_new_tokens=16)
    assert list(answer.token_ids) == EXPECTED["ids"][model]


def test_old_corpus_has_the_same_fingerprint():
    assert command("inspect", "corpus")["fingerprint"] == FINGERPRINT


def test_old_checkpoint_passes_verification():
    report = command("verify", "run", "--against", "files")
    assert report["holds"] is True
    assert [check["name"] for check in report["checks"]] == ["step-00000024"]
