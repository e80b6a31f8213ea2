"""`smolforge inspect CORPUS --tasks ...`: which items of evaluation tasks stand in a corpus."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.cli.progress import Progress
from smolforge.errors import SettingError

if TYPE_CHECKING:
    from smolforge.data.corpus import Corpus
    from smolforge.evaluation.overlap import Overlap

WORST = 5
"""Items that are shown with what they share."""


def of_corpus(path: Path, tasks: str) -> dict[str, Any]:
    """By task: share, n-gram size in words, number of items, ids of those that share one, the worst of them."""
    from smolforge.data.corpus import Corpus
    from smolforge.evaluation.overlap import overlap
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

    with Progress("tokens", sum(corpus.size(split)["tokens"] for split in SPLITS)) as done:
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


def lines(overlaps: dict[str, dict[str, Any]]) -> Sequence[str]:
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
