"""A picture of what is learned of a conversation or a pair of them: coloured on a terminal, elsewhere in brackets."""

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from smolforge.data.corpus import SPLITS, Corpus

LONGEST_SHOWN = 400
"""Tokens of the conversation that is shown, where there is one so short."""
ROWS = (1024, 2048, 8192)
"""Of tokens, of which conversations are commonly trained."""


def facts(corpus: Corpus) -> dict[str, Any]:
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
