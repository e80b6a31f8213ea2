"""`smolforge evaluate`."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from smolforge.cli.flags import LoadingFlags, Model, check_at_least, check_unique, split_names
from smolforge.cli.table import print_result, progress_bar, table_lines
from smolforge.errors import ConfigError, InvalidFileError

if TYPE_CHECKING:
    from smolforge.evaluation.multiple_choice import ItemScore, LongItems
    from smolforge.evaluation.tasks import Task
    from smolforge.models.decoder import LanguageModel

MAX_WINDOW = 2048
"""Longest window over a text unless another is asked for."""
TEXT_METRICS = {
    "loss": "loss {:.4f}",
    "perplexity": "perplexity {:.2f}",
    "bits_per_byte": "bits/byte {:.4f}",
    "accuracy": "accuracy {:.1%}",
    "tokens": "{:,} tokens",
}


@Parameter(name="*")
@dataclass(frozen=True)
class EvaluateFlags:
    """Flags for what is measured, and how."""

    tasks: str | None = None
    """Names and files, with commas between: hellaswag, arc_easy, arc_challenge, piqa, winogrande, openbookqa,
    commonsense_qa, lambada, mmlu_cloze, or a .jsonl file whose lines have query, choices and gold."""
    text: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None
    """Text files, and prepared corpora, whose held-out part is measured."""
    harness: str | None = None
    """Tasks of lm-evaluation-harness, with commas between: names from `lm_eval ls tasks`, or .yaml files. Values are
    the harness's, whose acc_norm is by characters."""
    limit: int | None = None
    """So many items of each task, from its beginning."""
    few_shot: int | None = None
    """So many examples with answers before each query: a named task's first training items, or a file's first ones.
    By default none; of the harness's, as many as each task says."""
    long_items: Literal["skip", "truncate"] = "skip"
    """What becomes of an item of --tasks that is longer than the model's context: skip counts it and scores it not,
    truncate leaves out the beginning of its query, as the harness always does."""
    sequence_length: int | None = None
    """Window over a text, in tokens; by default the model's context, at most 2048."""
    stride: int | None = None
    """Tokens from one window to the next; by default half a window, so that each token has that much before it."""
    log: Path | None = None
    """A file for one JSON object an item: id, gold, whether it was skipped or truncated, log-probabilities,
    predictions."""

    def check(self) -> None:
        """Raise ConfigError for wrong flags before anything is loaded."""
        texts, names = self.text or [], [*split_names(self.tasks), *split_names(self.harness)]
        if not names and not texts:
            choices = "--tasks (hellaswag,arc_easy,items.jsonl), --text FILE or --harness TASKS"
            raise ConfigError(f"there is nothing to measure; name {choices}")
        if self.long_items == "truncate" and not self.tasks:
            raise ConfigError("--long-items is of the items of --tasks, and none is named")
        check_at_least(1, limit=self.limit)
        check_at_least(0, few_shot=self.few_shot)
        if self.log is not None and not self.log.parent.is_dir():
            raise ConfigError(f"there is no folder {self.log.parent} for the log")
        check_unique(Path(name).stem for name in (*names, *texts))

    def window_and_stride(self, context: int) -> tuple[int, int]:
        """Return the tokens of a window over a text, and from one window to the next."""
        window = min(MAX_WINDOW, context) if self.sequence_length is None else self.sequence_length
        if not 1 <= window <= context:
            raise ConfigError(f"sequence-length is {window}; it should be 1 to {context}, this model's context")
        stride = max(1, window // 2) if self.stride is None else self.stride
        if not 1 <= stride <= window:
            raise ConfigError(f"stride is {stride}; it should be 1 to {window}, the length of a window")
        return window, stride


def evaluate(
    model: Model, *, flags: EvaluateFlags | None = None, loading: LoadingFlags | None = None, json_: bool = False
) -> None:
    """How good a model is: on a text, HellaSwag, ARC and others, or items of your own.

        smolforge evaluate runs/mine --text notes.txt

    Parameters
    ----------
    json_
        Print tasks.NAME.{acc, acc_norm, acc_chars, acc_stderr, n, truncated, skipped} or {loss, perplexity,
        bits_per_byte, accuracy, tokens} as one JSON object; acc_norm is by bytes, acc_chars by characters, as SmolLM2's
        own figures are; n items were scored, truncated of them shortened, and skipped others too long.
        Of the harness's tasks: all it measured, and n.
    """
    flags, loading = flags or EvaluateFlags(), loading or LoadingFlags()
    flags.check()
    harness_tasks, harness_results, samples = {}, {}, {}
    if names := split_names(flags.harness):
        with _harness() as harness:
            harness_tasks = harness.load_tasks(names)
    from smolforge.checkpoint.loading import fingerprint
    from smolforge.evaluation.multiple_choice import summary
    from smolforge.evaluation.tasks import load_task, published_scores
    from smolforge.training.environment import version, versions

    limit, few_shot = flags.limit, flags.few_shot or 0
    tasks = [load_task(name, limit, few_shot) for name in split_names(flags.tasks)]
    loaded = loading.load(model)
    weights = fingerprint(model) if json_ and not loading.random else None  # a run goes on, and its name means others
    window, stride = flags.window_and_stride(loaded.config.max_position_embeddings)
    results = {path.stem: _evaluate_text(loaded, path, window, stride=stride) for path in flags.text or []}
    scores = {task.name: _score_task(loaded, task, flags.long_items) for task in tasks}
    for task in tasks:
        results[task.name] = summary(scores[task.name]) | {"few_shot": few_shot, "source": task.source}
    if harness_tasks:
        with _harness() as harness:
            harness_results, samples = harness.run_tasks(loaded, harness_tasks, limit, few_shot=flags.few_shot)
    if flags.log is not None:
        _write_samples(flags.log, scores, samples)
    own = {} if few_shot else {name: values["acc_chars"] for name, values in results.items() if "acc_chars" in values}
    comparisons = published_scores(model, own)
    report = {
        "model": model,
        "weights": weights,
        "dtype": loading.dtype,
        "tasks": {**results, **harness_results},
        "published": {name: score for name, (_, score) in comparisons.items()},
        "versions": versions() | ({"lm_eval": version("lm_eval")} if harness_tasks else {}),
    }
    lines = table_lines([*_result_rows(results), *_harness_rows(harness_results)], align="<")
    lines += [
        f"{name}: acc_chars {measured:.1%}, published {score:.1%}{' over all items' if limit else ''}"
        for name, (measured, score) in comparisons.items()
    ]
    print_result(report, lines, as_json=json_)


def _evaluate_text(model: "LanguageModel", path: Path, length: int, *, stride: int) -> dict[str, Any]:
    """Measure a text, or the validation split of a corpus."""
    from smolforge.data.corpus import Corpus
    from smolforge.data.prepare.documents import read_text
    from smolforge.evaluation import measure_corpus, measure_text
    from smolforge.generation.stream import require_tokenizer

    if path.is_dir():
        corpus = Corpus.open(path)
        if corpus.metadata["tokenizer"] != require_tokenizer(model).fingerprint:
            raise InvalidFileError(f"the tokens of {path} were made with another tokenizer than this model's")
        return measure_corpus(model, corpus, length, stride=stride)
    if not path.is_file():
        raise InvalidFileError(f"there is no text or corpus at {path}")
    content = read_text(path)
    if not content:
        raise InvalidFileError(f"{path} is empty")
    total = len(require_tokenizer(model).encode(content))
    with progress_bar(path.stem, total) as advance:
        return measure_text(model, content, length, stride=stride, on_progress=advance)


def _score_task(model: "LanguageModel", task: "Task", long_items: "LongItems") -> list["ItemScore"]:
    from smolforge.evaluation.multiple_choice import score

    with progress_bar(task.name, sum(len(set(item.queries)) for item in task.items)) as advance:
        return score(model, task.items, long_items=long_items, on_progress=advance)


@contextmanager
def _harness() -> Iterator[Any]:
    """Yield the adapter of lm-evaluation-harness, whose prints go to standard error: of its log errors alone, of its
    bars those on a terminal."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):
        from smolforge.evaluation import harness

        yield harness


def _write_samples(log: Path, scores: dict[str, list["ItemScore"]], samples: dict[str, list[dict[str, Any]]]) -> None:
    records = [{"task": name, **score.as_json()} for name, of_task in scores.items() for score in of_task]
    for name, of_task in samples.items():
        records += [{"task": name, "id": str(sample["doc_id"]), **sample} for sample in of_task]
    log.write_text("".join(f"{json.dumps(record, default=str)}\n" for record in records), "utf-8", newline="\n")


def _result_rows(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield a row per text and per task."""
    for name, values in results.items():
        if "acc" in values:
            parts = [_format_metric(metric, values, ".1%") for metric in ("acc", "acc_norm", "acc_chars")]
            parts.append(f"n {values['n']:,}")
            parts += [f"{count} {values[count]:,}" for count in ("truncated", "skipped") if values[count]]
        else:
            parts = [template.format(values[metric]) for metric, template in TEXT_METRICS.items()]
        yield name, "  ".join(parts)


def _harness_rows(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield a row per task with the harness's own metrics."""
    for name, values in results.items():
        metrics = [key for key in values if key not in ("n", "few_shot", "source") and "_stderr" not in key]
        parts = [_format_metric(key, values, ".4f") for key in metrics]
        yield name, "  ".join([*parts, f"n {values['n']:,}", f"({values['source']})"])


def _format_metric(key: str, values: dict[str, Any], spec: str) -> str:
    metric, comma, filter_name = key.partition(",")
    value, error = values[key], values.get(f"{metric}_stderr{comma}{filter_name}")
    text = f"{value:{spec}}" if isinstance(value, float) else str(value)
    return f"{key} {text}" + (f" ± {error:{spec}}" if isinstance(error, float) else "")
