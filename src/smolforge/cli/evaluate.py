"""`smolforge evaluate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from smolforge.cli.progress import ProgressBar, quiet_library
from smolforge.errors import ConfigError, InvalidFileError

if TYPE_CHECKING:
    from smolforge.evaluation.multiple_choice import ItemScore
    from smolforge.evaluation.tasks import Task
    from smolforge.models.decoder import LanguageModel

MAX_WINDOW = 2048
"""Longest window over a text unless another is asked for."""


def evaluate(
    model: str,
    *,
    tasks: str | None = None,
    text: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    harness: str | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    log: Path | None = None,
    dtype: str = "float32",
    device: str = "auto",
    random: bool = False,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """How good a model is: on a text, HellaSwag, ARC and others, or items of your own.

        smolforge evaluate runs/mine --text notes.txt

    Parameters
    ----------
    model
        A Hub id, a model folder, a run folder or one of its checkpoints.
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
    dtype
        float32, bfloat16, float16 or float64.
    device
        cpu, cuda or mps; auto takes the fastest present.
    random
        Let a preset be measured with random weights.
    json_
        Print tasks.NAME.{acc, acc_norm, acc_chars, acc_stderr, n} or {loss, perplexity, bits_per_byte, accuracy,
        tokens} as one JSON object; acc_norm is by bytes, acc_chars by characters, as SmolLM2's own figures are.
        Of the harness's tasks: all it measured, and n.
    """
    task_names, harness_names = _split_names(tasks), _split_names(harness)
    _check_arguments(task_names, harness_names, text or [], limit=limit, few_shot=few_shot, log=log)
    harness_tasks = _find_harness_tasks(harness_names)
    from smolforge.checkpoint.loading import fingerprint, load
    from smolforge.device import pick_device
    from smolforge.evaluation.tasks import load_task, published_scores
    from smolforge.training.environment import version, versions

    loaded_tasks = [load_task(task_name, limit, few_shot or 0) for task_name in task_names]
    loaded = load(model, dtype, str(pick_device(device)), random=random)
    weights = fingerprint(model) if json_ and not random else None  # a run goes on, and its name means others
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
    if json_:
        published = {name: score for name, (_, score) in comparisons.items()}
        package_versions = versions() | ({"lm_eval": version("lm_eval")} if harness_names else {})
        summary = {"model": model, "weights": weights, "dtype": dtype, "tasks": {**results, **harness_results}}
        print(json.dumps({**summary, "published": published, "versions": package_versions}))
        return
    for line in [*_result_lines(results), *_harness_lines(harness_results)]:
        print(line)
    for name, (measured, published_score) in comparisons.items():
        print(f"{name}: acc_chars {measured:.1%}, published {published_score:.1%}{' over all items' if limit else ''}")


def _split_names(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _check_arguments(
    task_names: Sequence[str],
    harness_names: Sequence[str],
    texts: Sequence[Path],
    *,
    limit: int | None,
    few_shot: int | None,
    log: Path | None,
) -> None:
    """Raise ConfigError for wrong arguments before anything is loaded."""
    if not task_names and not texts and not harness_names:
        raise ConfigError(
            "there is nothing to measure; name --tasks (hellaswag,arc_easy,items.jsonl), --text FILE or --harness TASKS"
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it should be at least 1")
    if few_shot is not None and few_shot < 0:
        raise ConfigError(f"few-shot is {few_shot}; it should be at least 0")
    if log is not None and not log.parent.is_dir():
        raise ConfigError(f"there is no folder {log.parent} for the log")
    names = [Path(task_name).stem for task_name in (*task_names, *harness_names)] + [path.stem for path in texts]
    duplicates = [name for name in names if names.count(name) > 1]
    if duplicates:
        raise ConfigError(f"two of what is measured are called {duplicates[0]}; name each once, or rename a file")


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
    with ProgressBar(path.stem, total) as advance:
        return measure_text(model, content, length, stride=stride, on_progress=advance)


def _score_task(model: "LanguageModel", task: "Task") -> list["ItemScore"]:
    from smolforge.evaluation.multiple_choice import score

    with ProgressBar(task.name, sum(len(set(item.queries)) for item in task.items)) as advance:
        return score(model, task.items, on_progress=advance)


def _summarize_scores(scores: Sequence["ItemScore"], task: "Task", few_shot: int) -> dict[str, Any]:
    from smolforge.evaluation.multiple_choice import summary

    return summary(scores) | {"few_shot": few_shot, "source": task.source}


def _find_harness_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Return tasks of lm-evaluation-harness, for `_run_harness`."""
    if not names:
        return {}
    with quiet_library("lm_eval"):
        from smolforge.evaluation import harness

        return harness.load_tasks(names)


def _run_harness(
    model: "LanguageModel", tasks: dict[str, Any], limit: int | None, *, few_shot: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return values and samples by task."""
    if not tasks:
        return {}, {}
    with quiet_library("lm_eval"):
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


def _result_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line per task and per text."""
    width, lines = max(map(len, results), default=0) + 2, []
    for name, values in results.items():
        if "acc" not in values:
            text = f"loss {values['loss']:.4f}  perplexity {values['perplexity']:.2f}  "
            text += f"bits/byte {values['bits_per_byte']:.4f}  accuracy {values['accuracy']:.1%}  "
            text += f"{values['tokens']:,} tokens"
        else:
            text = "  ".join(_format_accuracy(metric, values) for metric in ("acc", "acc_norm", "acc_chars"))
            text += f"  n {values['n']:,}"
        lines.append(f"{name:<{width}}{text}")
    return lines


def _harness_lines(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line per task with the harness's own metrics."""
    width, lines = max(map(len, measured), default=0) + 2, []
    for name, values in measured.items():
        parts = [
            _format_metric(key, values)
            for key in values
            if key not in ("n", "few_shot", "source") and "_stderr" not in key
        ]
        lines.append(f"{name:<{width}}{'  '.join(parts)}  n {values['n']:,}  ({values['source']})")
    return lines


def _format_metric(key: str, values: dict[str, Any]) -> str:
    metric, comma, filter_name = key.partition(",")
    value, error = values[key], values.get(f"{metric}_stderr{comma}{filter_name}")
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return f"{key} {text}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _format_accuracy(name: str, values: dict[str, Any]) -> str:
    error = values[f"{name}_stderr"]
    return f"{name} {values[name]:.1%}" + ("" if error is None else f" ± {error:.1%}")
