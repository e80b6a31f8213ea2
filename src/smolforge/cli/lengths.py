"""What a corpus of texts looks like: how long its documents are, and some windows of it as training sees them."""

import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from smolforge.cli.blocks import bar
from smolforge.data.corpus import SPLITS, TRAIN, Corpus
from smolforge.errors import MissingResource, SettingError

WINDOWS, WINDOW_TOKENS = 3, 64
BORDER = " ⟦end⟧ "
"""What stands for the token that ends a document."""
LONGEST_BAR = 40
SUFFIXES = (".png", ".svg", ".pdf")


def facts(corpus: Corpus) -> dict[str, Any]:
    """Lengths in tokens, their histogram by powers of two, and windows from all over the training part."""
    lengths = lengths_of(corpus)
    split = TRAIN if corpus.size(TRAIN)["tokens"] else SPLITS[1]
    return {
        "document_tokens": {
            "shortest": int(lengths.min()),
            "median": int(np.median(lengths)),
            "mean": round(float(lengths.mean()), 1),
            "longest": int(lengths.max()),
        },
        "histogram": [
            {"from": int(start), "below": int(stop), "documents": int(documents), "tokens": int(tokens)}
            for start, stop, documents, tokens in histogram(lengths)
        ],
        "windows": windows(corpus, split),
    }


def lengths_of(corpus: Corpus) -> np.ndarray:
    """Tokens of each document of both splits, its end among them."""
    return np.concatenate([np.diff(corpus.ends(split), prepend=0) for split in SPLITS])


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int, int]]:
    """From, below, documents and tokens of each power of two there is."""
    powers = np.frexp(lengths)[1] - 1
    found = []
    for power in range(int(powers.min()), int(powers.max()) + 1):
        there = lengths[powers == power]
        found.append((1 << power, 2 << power, len(there), int(there.sum())))
    return found


def windows(corpus: Corpus, split: str) -> list[str]:
    """Decoded runs of tokens at even distances, the ends of documents marked."""
    ids, tokenizer = corpus.tokens(split), corpus.tokenizer()
    count = min(WINDOWS, max(1, len(ids) // WINDOW_TOKENS))
    found = []
    for number in range(count):
        start = number * (len(ids) // count)
        window = ids[start : start + WINDOW_TOKENS]
        ends = np.flatnonzero(window == corpus.facts["eos_id"])
        parts = [part[part != corpus.facts["eos_id"]].tolist() for part in np.split(window, ends + 1)]
        found.append(BORDER.join(tokenizer.decode(part) for part in parts))
    return found


def lines(found: dict[str, Any], columns: int | None = None) -> list[str]:
    """The histogram as bars, and the windows, as wide as the terminal."""
    columns = columns or shutil.get_terminal_size().columns
    most = max(row["tokens"] for row in found["histogram"])
    told = ["", "tokens a document       documents          tokens"]
    longest = min(LONGEST_BAR, columns - len(told[-1]) - 3)
    for row in found["histogram"]:
        span = f"{row['from']:,} to {row['below'] - 1:,}"
        drawn = bar(row["tokens"] / most, longest)
        told.append(f"{span:<20}{row['documents']:>13,}{row['tokens']:>16,}  {drawn}".rstrip())
    told += ["", f"windows of {WINDOW_TOKENS} tokens ({BORDER.strip()} ends a document)"]
    for number, window in enumerate(found["windows"], 1):
        text = " ".join(window.split())
        told += textwrap.wrap(text, columns - 1, initial_indent=f"{number}  ", subsequent_indent="   ")
    return told


def draw(corpus: Corpus, path: Path) -> None:
    """The histogram as a figure: documents and tokens by length. Raises SettingError for a kind that is not drawn."""
    if path.suffix not in SUFFIXES:
        raise SettingError(f"--figure {path} should end in {', '.join(SUFFIXES)}")
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = histogram(lengths_of(corpus))
    names = [f"{start:,}" for start, *_ in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    for shift, name, column, color in ((-0.2, "documents", 2, "#9aa5b1"), (0.2, "tokens", 3, "#2563eb")):
        total = sum(row[column] for row in rows)
        axes.bar(places + shift, [row[column] / total for row in rows], 0.4, label=f"{name} ({total:,})", color=color)
    axes.set_xticks(places, names, rotation=45 if len(rows) > 10 else 0)
    axes.set_xlabel("tokens a document, from this power of two to below the next")
    axes.set_ylabel("share")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    sizes = [corpus.size(split) for split in SPLITS]
    ratio = sum(size["bytes"] for size in sizes) / sum(size["tokens"] for size in sizes)
    axes.set_title(f"{corpus.folder.name}: {ratio:.2f} bytes a token", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise MissingResource(f"{path} could not be written: {error}") from None
