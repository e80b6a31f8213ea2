"""`smolforge evaluate`."""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from smolforge.cli.flags import LoadingFlags, Model, check_at_least, split_names
from smolforge.cli.table import print_result, progress_bar, table_lines
from smolforge.errors import ConfigError, InvalidFileError

if TYPE_CHECKING:
    from smolforge.evaluation.multiple_choice import ItemScore
    from smolforge.evaluation.tasks import Task
    from smolforge.models.decoder import LanguageModel

MAX_WINDOW = 2048
"""Longest window over a text unless another is asked for."""


def evaluate(
    model: Model,
    *,
    tasks: str | None = None,
    text: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    harness: str | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    log: Path | None = None,
    loading: LoadingFlags | None = None,
    json_: bool = False,
) -> None:
    """How good a model is: on a text, HellaSwag, ARC and others, or items of your own.

        smolforge evaluate runs/mine --text notes.txt

    Parameters
    ----------
    tasks
        Names and files, with commas between: hellaswag, arc_easy, arc_challenge, piqa, winogrande, openbookqa,
        commonsense_qa, lambada, mmlu_cloze, or a .jsonl file whose lines have query, choices and gold.
    text
        Text files, and prepared corpora, whose held-out part is measured.
    harness
        Tasks of lm-evaluation-harness, with commas between: names from `lm_eval ls tasks`, or .yaml files. Values are
        the harness's, whose acc_norm is by characters.
    limit
        So many items of each task, from its beginning.
    few_shot
        So many examples with answers before each query: a named task's first training items, or a file's first ones.
        By default none; of the harness's, as many as each task says.
    sequence_length
        Window over a text, in tokens; by default the model's context, at most 2048.
    stride
        Tokens from one window to the next; by default half a window, so that each token has that much before it.
    log
        A file for one JSON object an item: id, gold, log-probabilities, predictions.
    json_
        Print tasks.NAME.{acc, acc_norm, acc_chars, acc_stderr, n} or {loss, perplexity, bits_per_byte, accuracy,
        tokens} as one JSON object; acc_norm is by bytes, acc_chars by characters, as SmolLM2's own figures are.
        Of the harness's tasks: all it measured, and n.
    """
    task_names, harness_names, loading = split_names(tasks), split_names(harness), loading or LoadingFlags()
    if not task_names and not text and not harness_names:
        raise ConfigError(
            "there is nothing to measure; name --tasks (hellaswag,arc_easy,items.jsonl), --text FILE or --harness TASKS"
        )
    check_at_least(1, limit=limit)
    check_at_least(0, few_shot=few_shot)
    if log is not None and not log.parent.is_dir():
        raise ConfigError(f"there is no folder {log.parent} for the log")
    _check_unique(Path(name).stem for name in (*task_names, *harness_names, *(text or [])))
    harness_tasks = _find_harness_tasks(harness_names)
    from smolforge.checkpoint.loading import fingerprint
    from smolforge.evaluation.tasks import load_task, published_scores
    from smolforge.training.environment import version, versions

    loaded_tasks = [load_task(task_name, limit, few_shot or 0) for task_name in task_names]
    loaded = loading.load(model)
    weights = fingerprint(model) if json_ and not loading.random else None  # a run goes on, and its name means others
    window, step = _window_and_stride(loaded, sequence_length, stride)
    results = {path.stem: _evaluate_text(loaded, path, window, stride=step) for path in text or []}
    scores = {task.name: _score_task(loaded, task) for task in loaded_tasks}
    results |= {task.name: _summarize_scores(scores[task.name], task, few_shot or 0) for task in loaded_tasks}
    harness_results, samples = _run_harness(loaded, harness_tasks, limit, few_shot=few_shot)
    if log is not None:
        _write_samples(log, scores, samples)
    char_accuracies = {
        name: values["acc_chars"] for name, values in results.items() if "acc_chars" in values and not few_shot
    }
    comparisons = published_scores(model, char_accuracies)
    summary = {
        "model": model,
        "weights": weights,
        "dtype": loading.dtype,
        "tasks": {**results, **harness_results},
        "published": {name: score for name, (_, score) in comparisons.items()},
        "versions": versions() | ({"lm_eval": version("lm_eval")} if harness_names else {}),
    }
    lines = [*table_lines(_result_rows(results), align="<"), *table_lines(_harness_rows(harness_results), align="<")]
    lines += [
        f"{name}: acc_chars {measured:.1%}, published {score:.1%}{' over all items' if limit else ''}"
        for name, (measured, score) in comparisons.items()
    ]
    print_result(summary, lines, as_json=json_)


def _check_unique(names: Iterable[str]) -> None:
    """Raise ConfigError where two results would have the same name."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigError(f"two of what is measured are called {repeated[0]}; name each once, or rename a file")


def _window_and_stride(model: "LanguageModel", length: int | None, stride: int | None) -> tuple[int, int]:
    limit = model.config.max_position_embeddings
    length = min(MAX_WINDOW, limit) if length is None else length
    if not 1 <= length <= limit:
        raise ConfigError(f"sequence-length is {length}; it should be 1 to {limit}, this model's context")
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError(f"stride is {stride}; it should be 1 to {length}, the length of a window")
    return length, stride


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


def _score_task(model: "LanguageModel", task: "Task") -> list["ItemScore"]:
    from smolforge.evaluation.multiple_choice import score

    with progress_bar(task.name, sum(len(set(item.queries)) for item in task.items)) as advance:
        return score(model, task.items, on_progress=advance)


def _summarize_scores(scores: Sequence["ItemScore"], task: "Task", few_shot: int) -> dict[str, Any]:
    from smolforge.evaluation.multiple_choice import summary

    return summary(scores) | {"few_shot": few_shot, "source": task.source}


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """While it runs: its prints on standard error, its warnings apart from its own log, its bars on a terminal only."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):
        yield


def _find_harness_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Return tasks of lm-evaluation-harness, for `_run_harness`."""
    if not names:
        return {}
    with _quiet_harness():
        from smolforge.evaluation import harness

        return harness.load_tasks(names)


def _run_harness(
    model: "LanguageModel", tasks: dict[str, Any], limit: int | None, *, few_shot: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return values and samples by task."""
    if not tasks:
        return {}, {}
    with _quiet_harness():
        from smolforge.evaluation import harness

        return harness.run_tasks(model, tasks, limit, few_shot=few_shot)


def _write_samples(log: Path, scores: dict[str, list["ItemScore"]], samples: dict[str, list[dict[str, Any]]]) -> None:
    lines = [
        json.dumps({"task": name, **score.as_json()}) for name, task_scores in scores.items() for score in task_scores
    ]
    lines += [
        json.dumps({"task": name, "id": str(sample["doc_id"]), **sample}, default=str)
        for name, task_samples in samples.items()
        for sample in task_samples
    ]
    log.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _result_rows(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield a row per text and per task."""
    for name, values in results.items():
        if "acc" in values:
            accuracies = (_format_metric(metric, values, ".1%") for metric in ("acc", "acc_norm", "acc_chars"))
            yield name, "  ".join([*accuracies, f"n {values['n']:,}"])
        else:
            loss, bits = f"loss {values['loss']:.4f}", f"bits/byte {values['bits_per_byte']:.4f}"
            accuracy, tokens = f"accuracy {values['accuracy']:.1%}", f"{values['tokens']:,} tokens"
            yield name, "  ".join([loss, f"perplexity {values['perplexity']:.2f}", bits, accuracy, tokens])


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
