"""Check that files are what was written: every checkpoint and corpus of a run, or one folder with a manifest."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.checkpoint import training_state
from smolforge.data.corpus import SPLITS, Corpus
from smolforge.data.mixture import MIXTURE_FILE, Mixture
from smolforge.errors import InvalidFileError
from smolforge.verification.report import Check


def check_files(model: Path) -> Iterator[Check]:
    """Yield one check for each checkpoint, corpus or manifest of a MODEL."""
    if (model / "checkpoints").is_dir():
        for folder in training_state.list_checkpoints(model):
            check = checkpoint_check(folder)
            if folder.exists():  # a running run deletes old ones
                yield check
        if (model / "corpus" / "corpus.json").is_file():
            yield corpus_check(model / "corpus")
        if (model / MIXTURE_FILE).is_file():
            yield from mixture_checks(model)
    elif (model / atomic.MANIFEST).is_file():
        try:
            yield valid_check("files", atomic.check_manifest(model))
        except InvalidFileError as error:
            yield Check("files", False, str(error))


def checkpoint_check(folder: Path) -> Check:
    """Check a checkpoint of a run against its manifest, file by file."""
    try:
        return valid_check(folder.name, training_state.check_checkpoint(folder))
    except InvalidFileError as error:
        return Check(folder.name, False, str(error))


def corpus_check(folder: Path) -> Check:
    """Check that every token of a corpus is the one that was prepared."""
    try:
        text = Corpus.open(folder)
        text.check()
    except InvalidFileError as error:
        return Check("corpus", False, str(error))
    return Check("corpus", True, f"sound: {sum(text.size(split)['tokens'] for split in SPLITS):,} tokens")


def mixture_checks(run: Path) -> Iterator[Check]:
    """Check that every token of each source of a run's mixture is the one that was prepared."""
    try:
        sources = Mixture.open(run).sources
    except InvalidFileError as error:
        yield Check("mixture", False, str(error))
        return
    for name, text in sources.items():
        yield replace(corpus_check(text.folder), name=name)


def valid_check(name: str, manifest: dict[str, Any]) -> Check:
    """Return the check of a valid manifest."""
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    return Check(name, True, f"sound: {len(sizes)} files, {sum(sizes):,} bytes")
