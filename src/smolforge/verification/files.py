"""Whether files are what was written: every checkpoint and corpus of a run, or one folder with a manifest."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.checkpoint import training_state
from smolforge.data.corpus import SPLITS, Corpus
from smolforge.data.mixture import FILE, Mixture
from smolforge.errors import InvalidFile
from smolforge.verification.report import Check


def files(model: Path) -> Iterator[Check]:
    """One check for each thing that says what it should be; none where nothing does."""
    if (model / "checkpoints").is_dir():
        for folder in training_state.all_of(model):
            found = checkpoint(folder)
            if folder.exists():  # a run at work deletes old ones
                yield found
        if (model / "corpus" / "corpus.json").is_file():
            yield corpus(model / "corpus")
        if (model / FILE).is_file():
            yield from mixture(model)
    elif (model / atomic.MANIFEST).is_file():
        try:
            yield sound("files", atomic.check(model))
        except InvalidFile as error:
            yield Check("files", False, str(error))


def checkpoint(folder: Path) -> Check:
    """Whether a checkpoint of a run is as its manifest says, file by file."""
    try:
        return sound(folder.name, training_state.check(folder))
    except InvalidFile as error:
        return Check(folder.name, False, str(error))


def corpus(folder: Path) -> Check:
    """Whether every token of a corpus is the one that was prepared."""
    try:
        text = Corpus.open(folder)
        text.check()
    except InvalidFile as error:
        return Check("corpus", False, str(error))
    return Check("corpus", True, f"sound: {sum(text.size(split)['tokens'] for split in SPLITS):,} tokens")


def mixture(run: Path) -> Iterator[Check]:
    """Whether every token of each source of a run's mixture is the one that was prepared."""
    try:
        sources = Mixture.open(run).sources
    except InvalidFile as error:
        yield Check("mixture", False, str(error))
        return
    for name, text in sources.items():
        yield replace(corpus(text.folder), name=name)


def sound(name: str, manifest: dict[str, Any]) -> Check:
    """What a manifest that held says."""
    sizes = [each["bytes"] for each in manifest["files"].values()]
    return Check(name, True, f"sound: {len(sizes)} files, {sum(sizes):,} bytes")
