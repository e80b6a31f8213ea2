"""What `smolforge inspect` says of a mixture: before a run, tokens and expected epochs; of a run, what it read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from smolforge.errors import InvalidFile


def of_recipe(recipe: Any) -> dict[str, Any]:
    """Tokens of each source in each stage up to the last step, and expected epochs where its size is known."""
    from smolforge.runs.mixture import order_of

    if recipe.data.mixture is None:
        return {}
    order, train = order_of(recipe), recipe.train
    counts = order.of_stages(train.steps * train.rows)
    tokens = [{name: each * train.sequence_length for name, each in stage.items()} for stage in counts]
    begins = [begin // train.rows for begin in order.begins]
    stages = [
        {"name": name, "after_step": begin, "tokens": each}
        for name, begin, each in zip(recipe.data.stage_names, begins, tokens, strict=False)
    ]
    return {"mixture": {"stages": stages, "sources": {name: _expected(recipe, name, tokens) for name in order.names}}}


def warnings(recipe: Any, facts: dict[str, Any]) -> list[str]:
    """What a run of it would warn of, as far as sizes are known, and the files it would not find."""
    from smolforge.runs import mixture

    if recipe.data.mixture is None:
        return []
    epochs = {name: each["epochs"] for name, each in facts["mixture"]["sources"].items()}
    return [*_missing(recipe.data, epochs), *mixture.warnings(recipe, epochs)]


def _missing(data: Any, names: Iterable[str]) -> Iterator[str]:
    """Nobody asks the Hub."""
    from smolforge.data.sources import on_hub
    from smolforge.runs.mixture import check_there

    for name in names:
        try:
            if not on_hub(data.mixture[name].source):
                check_there(data, name)
        except InvalidFile as error:
            yield str(error)


def _expected(recipe: Any, name: str, tokens: list[dict[str, int]]) -> dict[str, Any]:
    asked, size = sum(stage[name] for stage in tokens), _size(recipe.data.mixture[name])
    return {
        "source": recipe.data.mixture[name].source,
        "tokens": asked,
        "size": size,
        "epochs": asked / size if size else None,
    }


def _size(source: Any) -> int | None:
    """Training tokens of a prepared corpus, or what is said of another source."""
    from smolforge.data.corpus import TRAIN, Corpus

    place = Path(source.source).expanduser()
    return Corpus.open(place).size(TRAIN)["tokens"] if (place / "corpus.json").is_file() else source.tokens


def of_run(run: Any) -> dict[str, Any]:
    """What a run's history says it read of each source."""
    from smolforge.comparison import history

    found = {each.source: {**each._asdict()} for each in history.read_source_totals(run)}
    return {"mixture": {"sources": found}} if found else {}


def lines(mixture: dict[str, Any]) -> list[str]:
    """A table: a line a source, a column a stage."""
    sources, stages = mixture.get("sources", {}), mixture.get("stages", [])
    if not sources:
        return []
    several = stages if len(stages) > 1 else []
    places = [f"{'stage ' * (number == 1)}{number}" for number, _ in enumerate(several, 1)]
    head = ["source", "tokens", "share", "epochs", *places]
    whole = sum(each["tokens"] for each in sources.values()) or 1
    rows = [
        [
            name,
            f"{each['tokens']:,}",
            f"{each['tokens'] / whole:.2%}",
            "-" if each["epochs"] is None else f"{each['epochs']:.2f}",
            *(f"{stage['tokens'][name] / (sum(stage['tokens'].values()) or 1):.1%}" for stage in several),
        ]
        for name, each in sources.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    table = ["  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows)]
    begins = [f"{each['name']} begins after step {each['after_step']:,}" for each in several]
    return ["", *table, *begins]
