"""What `smolforge inspect` reports of a mixture: of a recipe, tokens and expected epochs; of a run, what it read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from smolforge.cli.table import table_lines
from smolforge.comparison.history import RunHistory, read_source_totals
from smolforge.config import Source
from smolforge.data.corpus import TRAIN, Corpus
from smolforge.data.sources import is_on_hub
from smolforge.errors import InvalidFileError
from smolforge.runs.mixture import check_source_exists, mixture_warnings, order_of


def recipe_mixture_report(recipe: Any) -> dict[str, Any]:
    """Return tokens of each source in each stage up to the last step, and expected epochs where its size is known."""
    if recipe.data.mixture is None:
        return {}
    order, train = order_of(recipe), recipe.train
    counts = order.counts_by_stage(train.steps * train.sequences_per_step)
    tokens = [{name: count * train.sequence_length for name, count in stage.items()} for stage in counts]
    starts = [start // train.sequences_per_step for start in order.starts]
    stages = [
        {"name": name, "after_step": start, "tokens": stage_tokens}
        for name, start, stage_tokens in zip(recipe.data.stage_names, starts, tokens, strict=False)
    ]
    return {
        "mixture": {"stages": stages, "sources": {name: _source_report(recipe, name, tokens) for name in order.names}}
    }


def recipe_warnings(recipe: Any, report: dict[str, Any]) -> list[str]:
    """Return the warnings a run would give, as far as sizes are known, and the missing files."""
    if recipe.data.mixture is None:
        return []
    epochs = {name: source["epochs"] for name, source in report["mixture"]["sources"].items()}
    return [*_missing_sources(recipe, epochs), *mixture_warnings(recipe, epochs)]


def _missing_sources(recipe: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield an error for each local source that is missing; the Hub is not asked."""
    for name in names:
        try:
            if not is_on_hub(recipe.data.mixture[name].source):
                check_source_exists(recipe.data, name)
        except InvalidFileError as error:
            yield str(error)


def _source_report(recipe: Any, name: str, tokens: list[dict[str, int]]) -> dict[str, Any]:
    num_tokens, size = sum(stage[name] for stage in tokens), _source_tokens(recipe.data.mixture[name])
    return {
        "source": recipe.data.mixture[name].source,
        "tokens": num_tokens,
        "size": size,
        "epochs": num_tokens / size if size else None,
    }


def _source_tokens(source: Source) -> int | None:
    """Return the training tokens of a prepared corpus, or the stated size of another source."""
    path = Path(source.source).expanduser()
    return Corpus.open(path).size(TRAIN)["tokens"] if (path / "corpus.json").is_file() else source.tokens


def run_mixture_report(run: RunHistory) -> dict[str, Any]:
    """Return what a run has read of each source, from its history."""
    sources = {totals.source: totals._asdict() for totals in read_source_totals(run)}
    return {"mixture": {"sources": sources}} if sources else {}


def mixture_lines(report: dict[str, Any]) -> list[str]:
    """Return a table: one line per source, one column per stage."""
    sources, stages = report["mixture"]["sources"], report["mixture"].get("stages", [])
    several = stages if len(stages) > 1 else []
    total = sum(source["tokens"] for source in sources.values()) or 1
    rows = [
        (
            name,
            source["tokens"],
            f"{source['tokens'] / total:.2%}",
            None if source["epochs"] is None else f"{source['epochs']:.2f}",
            *(f"{stage['tokens'][name] / (sum(stage['tokens'].values()) or 1):.1%}" for stage in several),
        )
        for name, source in sources.items()
    ]
    head = ("source", "tokens", "share", "epochs", *(f"stage {number}" for number, _ in enumerate(several, 1)))
    stage_starts = [f"{stage['name']} begins after step {stage['after_step']:,}" for stage in several]
    return ["", *table_lines(rows, head), *stage_starts]
