"""What `smolforge inspect` reports of a mixture: of a recipe, tokens and expected epochs; of a run, what it read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from smolforge.errors import InvalidFileError


def recipe_mixture_report(recipe: Any) -> dict[str, Any]:
    """Return tokens of each source in each stage up to the last step, and expected epochs where its size is known."""
    from smolforge.runs.mixture import order_of

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
    from smolforge.runs import mixture

    if recipe.data.mixture is None:
        return []
    epochs = {name: source["epochs"] for name, source in report["mixture"]["sources"].items()}
    return [*_missing_sources(recipe.data, epochs), *mixture.mixture_warnings(recipe, epochs)]


def _missing_sources(data: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield an error for each local source that is missing; the Hub is not asked."""
    from smolforge.data.sources import is_on_hub
    from smolforge.runs.mixture import check_source_exists

    for name in names:
        try:
            if not is_on_hub(data.mixture[name].source):
                check_source_exists(data, name)
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


def _source_tokens(source: Any) -> int | None:
    """Return the training tokens of a prepared corpus, or the stated size of another source."""
    from smolforge.data.corpus import TRAIN, Corpus

    path = Path(source.source).expanduser()
    return Corpus.open(path).size(TRAIN)["tokens"] if (path / "corpus.json").is_file() else source.tokens


def run_mixture_report(run: Any) -> dict[str, Any]:
    """Return what a run has read of each source, from its history."""
    from smolforge.comparison import history

    sources = {totals.source: {**totals._asdict()} for totals in history.read_source_totals(run)}
    return {"mixture": {"sources": sources}} if sources else {}


def mixture_lines(mixture: dict[str, Any]) -> list[str]:
    """Return a table: one line per source, one column per stage."""
    sources, stages = mixture.get("sources", {}), mixture.get("stages", [])
    if not sources:
        return []
    several = stages if len(stages) > 1 else []
    stage_headers = [f"{'stage ' * (number == 1)}{number}" for number, _ in enumerate(several, 1)]
    head = ["source", "tokens", "share", "epochs", *stage_headers]
    total = sum(source["tokens"] for source in sources.values()) or 1
    rows = [
        [
            name,
            f"{source['tokens']:,}",
            f"{source['tokens'] / total:.2%}",
            "-" if source["epochs"] is None else f"{source['epochs']:.2f}",
            *(f"{stage['tokens'][name] / (sum(stage['tokens'].values()) or 1):.1%}" for stage in several),
        ]
        for name, source in sources.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    table = ["  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows)]
    stage_starts = [f"{stage['name']} begins after step {stage['after_step']:,}" for stage in several]
    return ["", *table, *stage_starts]
