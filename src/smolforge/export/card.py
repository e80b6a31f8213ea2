"""A model card from what a model's folder and its run say of themselves: README.md, and its loss curve beside it.

MODEL  ->  origin (run, base)  ->  scores  ->  head (YAML, as the Hub reads it) and sections (Markdown)

Nothing is in it that the files do not say; the same model makes the same card.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smolforge.checkpoint import resolve
from smolforge.data.sources.hub import name_of
from smolforge.export import sections
from smolforge.export.origin import Origin, origin
from smolforge.export.scores import HELD_OUT, Score, scores

README = "README.md"
Draw = Callable[[Path, Path, str], None]
"""Draws the loss curve of a run's folder into a file, under a title."""
LICENSE = "apache-2.0"


def write(
    folder: Path,
    model: str | Path,
    name: str,
    draw: Draw,
    licence: str = LICENSE,
    told: Path | None = None,
) -> None:
    """Put the card of a MODEL into a folder; `name` is what it will be loaded by, `told` a file of scores."""
    known = origin(model)
    found = scores(known, told)
    drawn = known.run is not None and any("loss" in record for record in known.run.metrics)
    if known.run is not None and drawn:
        draw(known.run.path, folder / sections.FIGURE, name)
    (folder / README).write_text(card(known, found, name, licence, drawn), "utf-8")


def card(known: Origin, found: Sequence[Score], name: str, licence: str, figure: bool) -> str:
    """The whole README.md."""
    chats = _chats(known.folder)
    parts = [f"# {name.rpartition('/')[2]}", sections.what(known, chats), sections.use(name, chats)]
    parts += [sections.results(found), sections.shape(known)]
    if known.run is not None:
        parts += [sections.data(known.run), sections.training(known.run, figure)]
    return (
        f"---\n{head(known, found, name, licence, chats)}\n---\n\n"
        + "\n\n".join([*parts, sections.licence(known, licence)])
        + "\n"
    )


def head(known: Origin, found: Sequence[Score], name: str, licence: str, chats: bool) -> str:
    """The YAML, made by the Hub's own classes.

    Scores are a model-index: the newer `.eval_results/` takes only data sets that are registered as benchmarks.
    """
    from huggingface_hub import ModelCardData

    results = [_result(score) for score in found]
    return ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["smolforge", *(["conversational"] if chats else [])],
        base_model=known.base_repo,
        datasets=_datasets(known) or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    ).to_yaml()


def _result(score: Score) -> Any:
    from huggingface_hub import EvalResult

    error = f" ± {score.stderr:.4f}" if score.stderr is not None else ""
    count = f", n {score.n:,}" if score.n else ""
    return EvalResult(
        task_type="text-generation",
        dataset_type=score.dataset or ("held-out" if score.task == HELD_OUT else score.task),
        dataset_name=score.task,
        metric_type=score.metric,
        metric_name=f"{score.metric}{error}{count} ({score.how})",
        metric_value=round(score.value, 6),
    )


def _datasets(known: Origin) -> list[str]:
    """Those of the Hub that were read: the corpus has the commit of each."""
    stamps = known.run.stamps if known.run else {}
    names = [name_of(source) for source, stamp in stamps.items() if len(stamp) == 1]
    return list(dict.fromkeys(name.repo for name in names if name is not None))


def _chats(folder: Path) -> bool:
    tokenizer = resolve.tokenizer_of(resolve.with_tokenizer(folder))
    return tokenizer is not None and tokenizer.template is not None
