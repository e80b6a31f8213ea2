"""What `smolforge inspect CORPUS` reports and draws.

text             document lengths, their histogram, some windows as training reads them
chat, pairs      how many tokens are learned, and one example: colored on a terminal, in brackets elsewhere
--tasks          items of evaluation tasks that share n-grams with the corpus
--figure         the histogram as a picture
"""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from smolforge.cli.live_view import bar
from smolforge.cli.progress import ProgressBar
from smolforge.data.corpus import SPLITS, TRAIN, Corpus
from smolforge.errors import ConfigError, MissingResourceError

if TYPE_CHECKING:
    from smolforge.data.corpus import Corpus
    from smolforge.evaluation.contamination import Overlap

NUM_WINDOWS, WINDOW_TOKENS = 3, 64
DOCUMENT_END = " ⟦end⟧ "
"""Shown in place of the token that ends a document."""
MAX_BAR_WIDTH = 40
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
MAX_SHOWN_TOKENS = 400
"""Maximum tokens of the conversation that is shown, where there is one so short."""
SEQUENCE_LENGTHS = (1024, 2048, 8192)
"""Common sequence lengths of training on conversations."""
NUM_WORST = 5
"""Items that are shown with what they share."""


def length_report(corpus: Corpus) -> dict[str, Any]:
    """Return document lengths in tokens, their histogram by powers of two, and windows of the training split."""
    lengths = document_lengths(corpus)
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
            for start, stop, documents, tokens in length_histogram(lengths)
        ],
        "windows": sample_windows(corpus, split),
    }


def document_lengths(corpus: Corpus) -> np.ndarray:
    """Return the tokens of each document of both splits, its end token included."""
    return np.concatenate([np.diff(corpus.ends(split), prepend=0) for split in SPLITS])


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return (from, below, documents, tokens) for each power of two."""
    powers = np.frexp(lengths)[1] - 1
    rows = []
    for power in range(int(powers.min()), int(powers.max()) + 1):
        selected = lengths[powers == power]
        rows.append((1 << power, 2 << power, len(selected), int(selected.sum())))
    return rows


def sample_windows(corpus: Corpus, split: str) -> list[str]:
    """Return decoded windows of tokens at even distances, the ends of documents marked."""
    ids, tokenizer = corpus.tokens(split), corpus.tokenizer()
    count = min(NUM_WINDOWS, max(1, len(ids) // WINDOW_TOKENS))
    texts = []
    for index in range(count):
        start = index * (len(ids) // count)
        window = ids[start : start + WINDOW_TOKENS]
        ends = np.flatnonzero(window == corpus.metadata["eos_id"])
        parts = [part[part != corpus.metadata["eos_id"]].tolist() for part in np.split(window, ends + 1)]
        texts.append(DOCUMENT_END.join(tokenizer.decode(part) for part in parts))
    return texts


def length_lines(report: dict[str, Any], columns: int | None = None) -> list[str]:
    """Return the histogram as bars, and the windows, as wide as the terminal."""
    columns = columns or shutil.get_terminal_size().columns
    max_tokens = max(row["tokens"] for row in report["histogram"])
    lines = ["", "tokens a document       documents          tokens"]
    bar_width = min(MAX_BAR_WIDTH, columns - len(lines[-1]) - 3)
    for row in report["histogram"]:
        span = f"{row['from']:,} to {row['below'] - 1:,}"
        bar_text = bar(row["tokens"] / max_tokens, bar_width)
        lines.append(f"{span:<20}{row['documents']:>13,}{row['tokens']:>16,}  {bar_text}".rstrip())
    lines += ["", f"windows of {WINDOW_TOKENS} tokens ({DOCUMENT_END.strip()} ends a document)"]
    for number, window in enumerate(report["windows"], 1):
        text = " ".join(window.split())
        lines += textwrap.wrap(text, columns - 1, initial_indent=f"{number}  ", subsequent_indent="   ")
    return lines


def draw_histogram(corpus: Corpus, path: Path) -> None:
    """Draw documents and tokens by length as a figure. Raises ConfigError for an unknown file type."""
    if path.suffix not in FIGURE_SUFFIXES:
        raise ConfigError(f"--figure {path} should end in {', '.join(FIGURE_SUFFIXES)}")
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = length_histogram(document_lengths(corpus))
    names = [f"{start:,}" for start, *_ in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(rows))
    for shift, name, column, color in ((-0.2, "documents", 2, "#9aa5b1"), (0.2, "tokens", 3, "#2563eb")):
        total = sum(row[column] for row in rows)
        axes.bar(
            positions + shift, [row[column] / total for row in rows], 0.4, label=f"{name} ({total:,})", color=color
        )
    axes.set_xticks(positions, names, rotation=45 if len(rows) > 10 else 0)
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
        raise MissingResourceError(f"{path} could not be written: {error}") from None


def mask_report(corpus: Corpus) -> dict[str, Any]:
    """Return the facts of a corpus of conversations or preference pairs."""
    lengths = [length for split in SPLITS for length in _row_lengths(corpus, split)]
    sizes = [corpus.size(split) for split in SPLITS]
    total, learned = (sum(size.get(key, 0) for size in sizes) for key in ("tokens", "learned_tokens"))
    sorted_lengths = sorted(lengths)
    return {
        **({"conversations": len(lengths)} if corpus.format == "chat" else {"pairs": len(lengths) // 2}),
        "left_out": corpus.metadata["dropped"],
        "learned_share": learned / total,
        "tokens_median": sorted_lengths[len(sorted_lengths) // 2],
        "tokens_longest": sorted_lengths[-1],
        **{
            f"longer_than_{sequence_length}": sum(length > sequence_length for length in lengths)
            for sequence_length in SEQUENCE_LENGTHS
        },
        "picture": mask_example(corpus),
    }


def mask_example(corpus: Corpus) -> list[tuple[str, bool]]:
    """Return an example as (text, learned): the longest of the first short conversations, or both answers of a pair."""
    split = next(split for split in SPLITS if corpus.size(split)["tokens"])
    ends, lengths = corpus.ends(split), _row_lengths(corpus, split)
    short = [index for index, length in enumerate(lengths) if length <= MAX_SHOWN_TOKENS]
    longest = max(short[:64], key=lambda index: lengths[index]) if short else 0
    shown = [longest] if corpus.format == "chat" else [longest - longest % 2, longest - longest % 2 + 1]
    tokenizer, parts = corpus.tokenizer(), []
    for index in shown:
        stop = int(ends[index])
        part = slice(stop - lengths[index], min(stop, stop - lengths[index] + 4 * MAX_SHOWN_TOKENS))
        ids, learned = corpus.tokens(split)[part].tolist(), corpus.learned(split)[part].tolist()
        parts += [
            (tokenizer.decode([token for token, _ in run]), bool(flag))
            for flag, run in groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
        ]
    return parts


def _row_lengths(corpus: Corpus, split: str) -> list[int]:
    ends = corpus.ends(split).tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def print_mask_example(parts: list[tuple[str, bool]]) -> None:
    """Print an example; learned text is green and underlined, or in brackets where there is no color."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal or console.no_color:
        print("one of them, what is learned in \u27e6brackets\u27e7:\n")
        print("".join(f"\u27e6{text}\u27e7" if learned else text for text, learned in parts))
        return
    console.print(Text.assemble("one of them, ", ("what is learned", "green underline"), ":\n"))
    console.print(Text.assemble(*((text, "green underline" if learned else "dim") for text, learned in parts)))


def task_overlap(path: Path, tasks: str) -> dict[str, Any]:
    """Return by task: share, n-gram size, number of items, ids of items that share one, the worst of them."""
    from smolforge.data.corpus import Corpus
    from smolforge.evaluation.contamination import find_overlaps
    from smolforge.evaluation.tasks import load_task

    task_names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not task_names:
        raise ConfigError("there is no task to look for; name --tasks (hellaswag,arc_easy,items.jsonl)")
    corpus, loaded_tasks = Corpus.open(path), [load_task(name) for name in task_names]
    names = [task.name for task in loaded_tasks]
    duplicates = [name for name in names if names.count(name) > 1]
    if duplicates:
        raise ConfigError(f"two tasks are called {duplicates[0]}; name each once, or rename a file")
    return {
        name: _overlap_as_json(result) for name, result in find_overlaps(loaded_tasks, _iterate_texts(corpus)).items()
    }


def _iterate_texts(corpus: "Corpus") -> Iterator[tuple[str, bool]]:
    """Yield all text of a corpus, both splits, with a progress bar over its tokens."""
    from smolforge.data.corpus import SPLITS

    with ProgressBar("tokens", sum(corpus.size(split)["tokens"] for split in SPLITS)) as advance:
        for split in SPLITS:
            for text, ends, tokens in corpus.texts(split):
                yield text, ends
                advance(tokens)


def _overlap_as_json(result: "Overlap") -> dict[str, Any]:
    return {
        "share": result.share,
        "ngram_words": result.size,
        "items": result.items,
        "shorter_items": result.short,
        "overlapping": len(result.shared),
        "ids": [item.id for item in result.shared],
        "worst": [item._asdict() for item in result.shared[:NUM_WORST]],
    }


def overlap_lines(overlaps: dict[str, dict[str, Any]]) -> Sequence[str]:
    """Return one line per task, and its worst items below."""
    lines = []
    for name, values in overlaps.items():
        shorter = f"; {values['shorter_items']:,} have fewer words and are compared whole" * bool(
            values["shorter_items"]
        )
        lines.append(
            f"{name}: {values['overlapping']:,} of {values['items']:,} items ({values['share']:.1%}) share "
            f"{values['ngram_words']} words in a row with this corpus{shorter}"
        )
        for item in values["worst"]:
            lines.append(f'  {item["id"]}: {item["matched"]} of {item["total"]} n-grams, as "{item["ngram"]}"')
    return lines
