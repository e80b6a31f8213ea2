"""Check that files are what was written: every checkpoint and corpus of a run, or one folder with a manifest."""

from collections.abc import Callable, Iterator
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
            check = sound_check(folder.name, lambda path: file_sizes(training_state.check_checkpoint(path)), folder)
            if folder.exists():  # a running run deletes old ones
                yield check
        if (model / "corpus" / "corpus.json").is_file():
            yield sound_check("corpus", corpus_size, model / "corpus")
        if (model / MIXTURE_FILE).is_file():
            try:
                sources = Mixture.open(model).sources
            except InvalidFileError as error:
                yield Check("mixture", False, str(error))
                return
            for name, text in sources.items():
                yield sound_check(name, corpus_size, text.folder)
    elif (model / atomic.MANIFEST).is_file():
        yield sound_check("files", lambda path: file_sizes(atomic.check_manifest(path)), model)


def sound_check(name: str, size_of: Callable[[Path], str], path: Path) -> Check:
    """Return a check that holds, with the size of what is at a path, unless `size_of` raises InvalidFileError."""
    try:
        return Check(name, True, f"sound: {size_of(path)}")
    except InvalidFileError as error:
        return Check(name, False, str(error))


def corpus_size(folder: Path) -> str:
    """Return the size of a corpus, every token of which is the one that was prepared. Raises InvalidFileError."""
    text = Corpus.open(folder)
    text.check()
    return f"{sum(text.size(split)['tokens'] for split in SPLITS):,} tokens"


def file_sizes(manifest: dict[str, Any]) -> str:
    """Return the number and the size of the files of a valid manifest."""
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    return f"{len(sizes)} files, {sum(sizes):,} bytes"
