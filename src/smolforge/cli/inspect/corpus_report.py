"""What a corpus of texts looks like: how long its documents are, and some windows of it as training sees them.

A picture of what is learned of a conversation or a pair of them: coloured on a terminal, elsewhere in brackets.

`smolforge inspect CORPUS --tasks ...`: which items of evaluation tasks stand in a corpus.
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
from smolforge.errors import MissingResource, SettingError

WINDOWS, WINDOW_TOKENS = 3, 64
BORDER = " ⟦end⟧ "
"""What stands for the token that ends a document."""
LONGEST_BAR = 40
SUFFIXES = (".png", ".svg", ".pdf")


def length_facts(corpus: Corpus) -> dict[str, Any]:
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


def length_lines(found: dict[str, Any], columns: int | None = None) -> list[str]:
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


LONGEST_SHOWN = 400
"""Tokens of the conversation that is shown, where there is one so short."""
ROWS = (1024, 2048, 8192)
"""Of tokens, of which conversations are commonly trained."""


def mask_facts(corpus: Corpus) -> dict[str, Any]:
    """What there is to know of a corpus of conversations, or of pairs of them."""
    lengths = [length for split in SPLITS for length in _lengths(corpus, split)]
    sizes = [corpus.size(split) for split in SPLITS]
    total, learned = (sum(size.get(key, 0) for size in sizes) for key in ("tokens", "learned_tokens"))
    ordered = sorted(lengths)
    return {
        **({"conversations": len(lengths)} if corpus.format == "chat" else {"pairs": len(lengths) // 2}),
        "left_out": corpus.facts["dropped"],
        "learned_share": learned / total,
        "tokens_median": ordered[len(ordered) // 2],
        "tokens_longest": ordered[-1],
        **{f"longer_than_{row}": sum(length > row for length in lengths) for row in ROWS},
        "picture": picture(corpus),
    }


def picture(corpus: Corpus) -> list[tuple[str, bool]]:
    """One conversation in parts, and whether each is learned: of the first short ones the longest; both of a pair."""
    split = next(split for split in SPLITS if corpus.size(split)["tokens"])
    ends, lengths = corpus.ends(split), _lengths(corpus, split)
    short = [number for number, length in enumerate(lengths) if length <= LONGEST_SHOWN]
    number = max(short[:64], key=lambda each: lengths[each]) if short else 0
    shown = [number] if corpus.format == "chat" else [number - number % 2, number - number % 2 + 1]
    tokenizer, parts = corpus.tokenizer(), []
    for each in shown:
        stop = int(ends[each])
        part = slice(stop - lengths[each], min(stop, stop - lengths[each] + 4 * LONGEST_SHOWN))
        ids, learned = corpus.tokens(split)[part].tolist(), corpus.learned(split)[part].tolist()
        parts += [
            (tokenizer.decode([each for each, _ in run]), bool(flag))
            for flag, run in groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
        ]
    return parts


def _lengths(corpus: Corpus, split: str) -> list[int]:
    ends = corpus.ends(split).tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def show(parts: list[tuple[str, bool]]) -> None:
    """Print it: what is learned is green and underlined, or between brackets where there is no colour."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal or console.no_color:
        print("one of them, what is learned in \u27e6brackets\u27e7:\n")
        print("".join(f"\u27e6{text}\u27e7" if learned else text for text, learned in parts))
        return
    console.print(Text.assemble("one of them, ", ("what is learned", "green underline"), ":\n"))
    console.print(Text.assemble(*((text, "green underline" if learned else "dim") for text, learned in parts)))


if TYPE_CHECKING:
    from smolforge.data.corpus import Corpus
    from smolforge.evaluation.contamination import Overlap

WORST = 5
"""Items that are shown with what they share."""


def of_corpus(path: Path, tasks: str) -> dict[str, Any]:
    """By task: share, n-gram size in words, number of items, ids of those that share one, the worst of them."""
    from smolforge.data.corpus import Corpus
    from smolforge.evaluation.contamination import overlap
    from smolforge.evaluation.tasks import find

    words = [word.strip() for word in tasks.split(",") if word.strip()]
    if not words:
        raise SettingError("there is no task to look for; name --tasks (hellaswag,arc_easy,items.jsonl)")
    corpus, asked = Corpus.open(path), [find(word) for word in words]
    twice = [task.name for task in asked if [other.name for other in asked].count(task.name) > 1]
    if twice:
        raise SettingError(f"two tasks are called {twice[0]}; name each once, or rename a file")
    return {name: _as_json(found) for name, found in overlap(asked, _texts(corpus)).items()}


def _texts(corpus: "Corpus") -> Iterator[tuple[str, bool]]:
    """All text of a corpus, what is held out too, with a bar over its tokens."""
    from smolforge.data.corpus import SPLITS

    with ProgressBar("tokens", sum(corpus.size(split)["tokens"] for split in SPLITS)) as done:
        for split in SPLITS:
            for text, ends, tokens in corpus.texts(split):
                yield text, ends
                done(tokens)


def _as_json(found: "Overlap") -> dict[str, Any]:
    return {
        "share": found.share,
        "ngram_words": found.size,
        "items": found.items,
        "shorter_items": found.short,
        "overlapping": len(found.shared),
        "ids": [each.id for each in found.shared],
        "worst": [each._asdict() for each in found.shared[:WORST]],
    }


def overlap_lines(overlaps: dict[str, dict[str, Any]]) -> Sequence[str]:
    """For people: one line a task, and its worst items below."""
    told = []
    for name, found in overlaps.items():
        shorter = f"; {found['shorter_items']:,} have fewer words and are compared whole" * bool(found["shorter_items"])
        told.append(
            f"{name}: {found['overlapping']:,} of {found['items']:,} items ({found['share']:.1%}) share "
            f"{found['ngram_words']} words in a row with this corpus{shorter}"
        )
        for each in found["worst"]:
            told.append(f'  {each["id"]}: {each["found"]} of {each["total"]} n-grams, as "{each["ngram"]}"')
    return told
