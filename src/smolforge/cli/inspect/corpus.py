"""What `smolforge inspect CORPUS` reports and draws.

text             document lengths, their histogram, some windows as training reads them
chat, pairs      how many tokens are learned, and one example: colored on a terminal, in brackets elsewhere
--tasks          items of evaluation tasks that share n-grams with the corpus
--figure         the histogram as a picture
"""

import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from smolforge.cli.flags import check_unique, split_names
from smolforge.cli.table import bar, progress_bar, table_lines
from smolforge.data.corpus import SPLITS, TRAIN, Corpus
from smolforge.errors import ConfigError, MissingResourceError
from smolforge.evaluation.contamination import Overlap, find_overlaps
from smolforge.evaluation.tasks import load_task

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


def corpus_report(path: Path) -> dict[str, Any]:
    """Return the sizes of a corpus, and what its format has to report."""
    corpus = Corpus.open(path)
    sizes = {split: corpus.size(split) for split in SPLITS}
    dropped = {reason: count for reason, count in corpus.metadata.get("dropped", {}).items() if count}
    return {
        **sizes,
        "bytes_per_token": bytes_per_token(corpus),
        "fingerprint": corpus.fingerprint,
        "lost_bytes": corpus.metadata.get("lost_bytes", {}) or None,
        "sources": corpus.metadata["request"]["data"]["sources"],
        **(mask_report(corpus) if corpus.format != "text" else {"left_out": dropped or None} | length_report(corpus)),
    }


def bytes_per_token(corpus: Corpus) -> float:
    text_bytes, tokens = (sum(corpus.size(split)[key] for split in SPLITS) for key in ("bytes", "tokens"))
    return text_bytes / tokens


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
        "histogram": length_histogram(lengths),
        "windows": sample_windows(corpus, split),
    }


def document_lengths(corpus: Corpus, splits: Sequence[str] = SPLITS) -> np.ndarray:
    """Return the tokens of each document, its end token included."""
    return np.concatenate([np.diff(corpus.ends(split), prepend=0) for split in splits])


def length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Return the documents and tokens of each power of two."""
    powers = np.frexp(lengths)[1] - 1
    parts = {power: lengths[powers == power] for power in range(int(powers.min()), int(powers.max()) + 1)}
    return [
        {"from": 1 << power, "below": 2 << power, "documents": len(part), "tokens": int(part.sum())}
        for power, part in parts.items()
    ]


def sample_windows(corpus: Corpus, split: str) -> list[str]:
    """Return decoded windows of tokens at even distances, the ends of documents marked."""
    ids, tokenizer = corpus.tokens(split), corpus.tokenizer()
    count = min(NUM_WINDOWS, max(1, len(ids) // WINDOW_TOKENS))
    texts = []
    for index in range(count):
        start = index * (len(ids) // count)
        window = ids[start : start + WINDOW_TOKENS]
        ends = np.flatnonzero(window == corpus.metadata["eos_id"])
        parts = [part[~np.isin(part, tokenizer.border_ids)].tolist() for part in np.split(window, ends + 1)]
        texts.append(DOCUMENT_END.join(tokenizer.decode(part) for part in parts))
    return texts


def length_lines(report: dict[str, Any], columns: int | None = None) -> list[str]:
    """Return the histogram as bars, and the windows, as wide as the terminal."""
    columns = columns or shutil.get_terminal_size().columns
    max_tokens = max(row["tokens"] for row in report["histogram"])
    rows = [
        (f"{row['from']:,} to {row['below'] - 1:,}", row["documents"], row["tokens"]) for row in report["histogram"]
    ]
    head = ("tokens a document", "documents", "tokens")
    bar_width = min(MAX_BAR_WIDTH, columns - max(map(len, table_lines(rows, head))) - 3)
    rows = [(*row, bar(row[2] / max_tokens, bar_width)) for row in rows]
    windows = enumerate((" ".join(window.split()) for window in report["windows"]), 1)
    return [
        "",
        *table_lines(rows, (*head, ""), "<>><"),
        "",
        f"windows of {WINDOW_TOKENS} tokens ({DOCUMENT_END.strip()} ends a document)",
        *table_lines(windows, align="<", width=columns - 1),
    ]


def draw_histogram(path: Path, out: Path) -> None:
    """Draw documents and tokens by length as a figure. Raises ConfigError for an unknown file type."""
    if out.suffix not in FIGURE_SUFFIXES:
        raise ConfigError(f"--figure {out} should end in {', '.join(FIGURE_SUFFIXES)}")
    from matplotlib.figure import Figure

    corpus = Corpus.open(path)
    rows = length_histogram(document_lengths(corpus))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(rows))
    for shift, name, color in ((-0.2, "documents", "#9aa5b1"), (0.2, "tokens", "#2563eb")):
        total = sum(row[name] for row in rows)
        shares = [row[name] / total for row in rows]
        axes.bar(positions + shift, shares, 0.4, label=f"{name} ({total:,})", color=color)
    axes.set_xticks(positions, [f"{row['from']:,}" for row in rows], rotation=45 if len(rows) > 10 else 0)
    axes.set_xlabel("tokens a document, from this power of two to below the next")
    axes.set_ylabel("share")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_title(f"{corpus.folder.name}: {bytes_per_token(corpus):.2f} bytes a token", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise MissingResourceError(f"{out} could not be written: {error}") from None


def mask_report(corpus: Corpus) -> dict[str, Any]:
    """Return the facts of a corpus of conversations or preference pairs."""
    lengths = np.sort(document_lengths(corpus))
    sizes = [corpus.size(split) for split in SPLITS]
    total, learned = (sum(size.get(key, 0) for size in sizes) for key in ("tokens", "learned_tokens"))
    return {
        **({"conversations": len(lengths)} if corpus.format == "chat" else {"pairs": len(lengths) // 2}),
        "left_out": corpus.metadata["dropped"],
        "learned_share": learned / total,
        "tokens_median": int(lengths[len(lengths) // 2]),
        "tokens_longest": int(lengths[-1]),
        **{f"longer_than_{length}": int((lengths > length).sum()) for length in SEQUENCE_LENGTHS},
        "picture": mask_example(corpus),
    }


def mask_example(corpus: Corpus) -> list[tuple[str, bool]]:
    """Return an example as (text, learned): the longest of the first short conversations, or both answers of a pair."""
    split = next(split for split in SPLITS if corpus.size(split)["tokens"])
    ends, lengths = corpus.ends(split).tolist(), document_lengths(corpus, [split]).tolist()
    short = [index for index, length in enumerate(lengths) if length <= MAX_SHOWN_TOKENS]
    longest = max(short[:64], key=lambda index: lengths[index]) if short else 0
    shown = [longest] if corpus.format == "chat" else [longest - longest % 2, longest - longest % 2 + 1]
    tokenizer, parts = corpus.tokenizer(), []
    for index in shown:
        start = ends[index] - lengths[index]
        part = slice(start, min(ends[index], start + 4 * MAX_SHOWN_TOKENS))
        ids, learned = corpus.tokens(split)[part].tolist(), corpus.learned(split)[part].tolist()
        parts += [
            (tokenizer.decode([token for token, _ in run]), bool(flag))
            for flag, run in groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
        ]
    return parts


def mask_lines(report: dict[str, Any]) -> list[str]:
    """Return the example; learned text is green and underlined, or in brackets where there is no color."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal or console.no_color:
        text = "".join(f"\u27e6{text}\u27e7" if learned else text for text, learned in report["picture"])
        return ["", "one of them, what is learned in \u27e6brackets\u27e7:", "", text]
    with console.capture() as capture:
        console.print(Text.assemble("\none of them, ", ("what is learned", "green underline"), ":\n"))
        parts = ((text, "green underline" if learned else "dim") for text, learned in report["picture"])
        console.print(Text.assemble(*parts))
    return [capture.get()]


def task_overlap(path: Path, tasks: str) -> dict[str, Any]:
    """Return by task: share, n-gram size, number of items, ids of items that share one, the worst of them."""
    task_names = split_names(tasks)
    if not task_names:
        raise ConfigError("there is no task to look for; name --tasks (hellaswag,arc_easy,items.jsonl)")
    corpus, loaded_tasks = Corpus.open(path), [load_task(name) for name in task_names]
    check_unique(task.name for task in loaded_tasks)
    overlaps = find_overlaps(loaded_tasks, _iterate_texts(corpus))
    return {name: _overlap_report(overlap) for name, overlap in overlaps.items()}


def _iterate_texts(corpus: Corpus) -> Iterator[tuple[str, bool]]:
    """Yield all text of a corpus, both splits, with a progress bar over its tokens."""
    with progress_bar("tokens", sum(corpus.size(split)["tokens"] for split in SPLITS)) as advance:
        for split in SPLITS:
            for text, ends, tokens in corpus.texts(split):
                yield text, ends
                advance(tokens)


def _overlap_report(overlap: Overlap) -> dict[str, Any]:
    return {
        "share": overlap.share,
        "ngram_words": overlap.size,
        "items": overlap.items,
        "shorter_items": overlap.short,
        "overlapping": len(overlap.shared),
        "ids": [item.id for item in overlap.shared],
        "worst": [item._asdict() for item in overlap.shared[:NUM_WORST]],
    }


def overlap_lines(report: dict[str, Any]) -> list[str]:
    """Return one line per task, and its worst items below."""
    lines = []
    for name, values in report["overlap"].items():
        shorter = f"; {values['shorter_items']:,} have fewer words and are compared whole"
        lines.append(
            f"{name}: {values['overlapping']:,} of {values['items']:,} items ({values['share']:.1%}) share "
            f"{values['ngram_words']} words in a row with this corpus{shorter if values['shorter_items'] else ''}"
        )
        lines += [
            f'  {item["id"]}: {item["matched"]} of {item["total"]} n-grams, as "{item["ngram"]}"'
            for item in values["worst"]
        ]
    return lines
