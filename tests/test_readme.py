"""The README does what it says: its commands and its Python run, shortened; its map and links are there."""

import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import RELEASED, needs_released

from smolforge import cli, verification
from smolforge.checkpoint import huggingface
from smolforge.config import ModelConfig
from smolforge.models.stats import parameter_counts
from smolforge.testing import sentences, tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [content for name, content in fenced if name == language]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder as the reader has it: the recipes, a text, an hour of patience cut to seconds."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "my.txt").write_text(sentences(3000))
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = {
    "train": ["--model.num-hidden-layers", "1", "--model.vocab-size", "400", "--train.batch-tokens", "512"],
}


@pytest.mark.heavy
@pytest.mark.parametrize("shortened", [True, pytest.param(False, marks=pytest.mark.long)])
def test_readme_commands_run(home, capsys, shortened):
    (home / "notes.txt").write_text(sentences(40, 5000))
    lines = blocks("bash")[2].strip().splitlines()
    assert len(lines) == 6
    for line in lines:
        program, verb, *words = shlex.split(line.replace("--budget 5m", "--budget 8K-tokens") if shortened else line)
        assert program == "smolforge"
        assert cli.run([verb, *words, *(SHORT.get(verb, []) if shortened else [])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Once upon a time")
    assert "where the time goes" in out
    assert "<svg" in (home / "report" / "index.html").read_text()
    assert (home / "mine.gguf").is_file()


def test_readme_hub_commands_run(home, capsys, hub, monkeypatch, compiling):
    """On a Hub of our own, where the name stands for a small model; what is published of the real one is put aside."""
    model = tiny_model(max_position_embeddings=2048)
    huggingface.save(model, home / "small", model.tokenizer)
    hub.add("HuggingFaceTB/SmolLM2-135M", home / "small")
    monkeypatch.setattr(verification, "published_releases", list)
    for line in blocks("bash")[1].strip().splitlines():
        program, verb, *words = shlex.split(line)
        assert program == "smolforge"
        shortened = ["--against", "transformers", "--max-length", "128"] if verb == "verify" else []
        assert cli.run([verb, *words, *shortened]) == 0, line
    assert "all holds" in capsys.readouterr().out


@pytest.mark.long
@needs_released
def test_readme_commands_run_on_the_released_model(home, capsys, monkeypatch):
    """What needs minutes at full length is shortened: the text, the run, and the rows of `verify`."""
    shortened = {"verify": ["--max-length", "16"], "train": ["--train.sequence-length", "64"]}
    monkeypatch.setattr("sys.stdin", io.StringIO("What is gravity?\n"))
    (home / "my.txt").write_text(sentences(30))
    for line in blocks("bash")[0].strip().splitlines()[1:]:
        line = line.replace("$MODEL", str(RELEASED)).replace("--budget 10m", "--budget 256-tokens")
        program, verb, *words = shlex.split(line)
        assert program == "smolforge"
        assert cli.run([verb, *words, *shortened.get(verb, [])]) == 0, line
    out = capsys.readouterr().out
    (shown,) = (block for block in blocks("") if block.startswith("Gravity is"))
    assert " ".join(out.split()).startswith(" ".join(shown.split()))
    assert "all holds" in out


def test_readme_verify_output_has_the_format_of_verify():
    """The figures of a run on the full shape; here, that they are spelled as `verify` spells them."""
    (shown,) = (block for block in blocks("") if block.startswith("holds  parameters"))
    counts = parameter_counts(ModelConfig())
    said = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    assert f"holds  parameters       {sum(counts.values()):,} in 272 tensors ({said})" in shown
    assert huggingface.tensor_count(ModelConfig()) == 272


@pytest.mark.long
def test_readme_quickstart_runs_in_full(home, capsys):
    assert cli.run(["quickstart"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    for part in ("stopped by SIGINT", "xz -9 alone", "equal to the bit", "loss.png"):
        assert part in said
    summary = json.loads((home / "quickstart" / "summary.json").read_text())
    assert summary["bits_per_byte"] < summary["xz_bits_per_byte"]


def test_readme_python_runs(home, capsys):
    (program,) = blocks("python")
    for count, short in (("500", "12"), ("550", "14")):
        changes = '"model.num_hidden_layers": 1, "model.vocab_size": 400, "train.batch_tokens": 512'
        program = program.replace(f"steps={count})", f"steps={short}, **{{{changes}}})")
    namespace: dict[str, object] = {}
    exec(compile(program, "README.md", "exec"), namespace)
    assert capsys.readouterr().out
    assert namespace["run"].metrics["step"] == 14


def test_readme_code_map_names_existing_files():
    (the_map,) = (block for block in blocks("") if block.startswith("recipes/"))
    names = re.findall(r"(?:^|\s{2,})([a-z_/]+(?:\.py|/))", the_map)
    assert len(names) > 30
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "src" / "smolforge" / name).exists(), name


def test_links_resolve():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_first_command_is_a_make_target():
    assert "\nquickstart:" in (ROOT / "Makefile").read_text()
    assert "make quickstart" in README
    assert not re.search(r"\b(REPOSITORY|QUICKSTART|TBD)\b", README)
    assert sys.version_info >= (3, 11)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
