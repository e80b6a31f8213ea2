"""The pages that add something to smolforge, typed as they stand into a copy of the package: docs/howto/add-*.md."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, Block, blocks, is_as_shown
from test_docs import words_of

from smolforge.checkpoint import huggingface
from smolforge.testing import sentences, tiny_model

PAGES = ("add-a-model.md", "add-an-optimizer.md", "add-a-tracker.md", "add-a-task.md")


def apply_diff(file: Path, diff: str) -> None:
    """Replace the lines of a diff without line numbers, which must occur exactly once."""
    lines = [(line[:1], line[1:] + "\n") for line in diff.splitlines()]
    before, after = ("".join(line for sign, line in lines if sign in kept) for kept in (("", " ", "-"), ("", " ", "+")))
    content = file.read_text()
    assert content.count(before) == 1, f"{file} has not just once\n{before}"
    file.write_text(content.replace(before, after))


def type_block(block: Block, target: Path | None, folder: Path) -> str:
    """Do what a reader does with a block: write its file, change a file, or run it. Return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    if block.language == "diff":
        assert target is not None
        apply_diff(folder / target, block.content)
        return ""
    if block.file:
        (folder / block.file).write_text(block.content)
        return ""
    if block.language == "python":
        commands = [[sys.executable, "-c", block.content]]
    else:
        words = [words_of(line) if line.startswith("smolforge") else None for line in block.commands]
        commands = [
            [sys.executable, "-m", "smolforge", *words_] if words_ else shlex.split(line)
            for words_, line in zip(words, block.commands, strict=True)
        ]
    printed = ""
    for command in commands:
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}: {command}\n{result.stderr}"
        printed += result.stdout
    return printed


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_howto_page_works_as_typed(page, tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("recipes", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my.txt").write_text(sentences(1500))
    model = tiny_model(max_position_embeddings=2048)
    huggingface.save(model, tmp_path / "small", model.tokenizer)
    content = (ROOT / "docs" / "howto" / page).read_text()
    for block in blocks(ROOT / "docs" / "howto" / page):
        if block.language in ("text", "sh"):
            continue
        position = content.index(block.content)
        named = re.findall(r"`(src/[\w./]+\.py)`:\s*$", content[:position].rpartition("```")[0])
        printed = type_block(block, Path(named[-1]) if named else None, tmp_path)
        if block.printed is not None:
            assert is_as_shown(block.printed, printed), f"{block} prints\n{printed}"
