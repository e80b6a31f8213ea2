"""`smolforge evaluate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from smolforge.cli.progress import ProgressBar, quiet_library
from smolforge.errors import InvalidFile, SettingError

if TYPE_CHECKING:
    from smolforge.evaluation.multiple_choice import Score
    from smolforge.evaluation.tasks import Task
    from smolforge.models.decoder import LanguageModel

WINDOW = 2048
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
    words, asked_there = _words(tasks), _words(harness)
    _check(words, asked_there, text or [], limit, few_shot, log)
    found = _found(asked_there)
    from smolforge.checkpoint.loading import fingerprint, load
    from smolforge.device import pick_device
    from smolforge.evaluation.tasks import find, published
    from smolforge.training.environment import version, versions

    asked = [find(word, limit, few_shot or 0) for word in words]
    loaded = load(model, dtype, str(pick_device(device)), random)
    weights = fingerprint(model) if json_ and not random else None  # a run goes on, and its name means others
    window, step = _window(loaded, sequence_length, stride)
    results = {path.stem: _text(loaded, path, window, step) for path in text or []}
    scores = {task.name: _scored(loaded, task) for task in asked}
    results |= {task.name: _summary(scores[task.name], task, few_shot or 0) for task in asked}
    measured, samples = _harness(loaded, found, limit, few_shot)
    if log is not None:
        _write(log, scores, samples)
    chars = {name: found["acc_chars"] for name, found in results.items() if "acc_chars" in found and not few_shot}
    beside = published(model, chars)
    if json_:
        theirs = {name: score for name, (_, score) in beside.items()}
        made_by = versions() | ({"lm_eval": version("lm_eval")} if asked_there else {})
        said = {"model": model, "weights": weights, "dtype": dtype, "tasks": {**results, **measured}}
        print(json.dumps({**said, "published": theirs, "versions": made_by}))
        return
    for line in [*_lines(results), *_harness_lines(measured)]:
        print(line)
    for name, (ours, theirs) in beside.items():
        print(f"{name}: acc_chars {ours:.1%}, published {theirs:.1%}{' over all items' if limit else ''}")


def _words(names: str | None) -> list[str]:
    return [word.strip() for word in (names or "").split(",") if word.strip()]


def _check(
    words: Sequence[str],
    asked_there: Sequence[str],
    texts: Sequence[Path],
    limit: int | None,
    few_shot: int | None,
    log: Path | None,
) -> None:
    """Raises SettingError for what cannot be meant, before anything is loaded."""
    if not words and not texts and not asked_there:
        raise SettingError(
            "there is nothing to measure; name --tasks (hellaswag,arc_easy,items.jsonl), --text FILE or --harness TASKS"
        )
    if limit is not None and limit < 1:
        raise SettingError(f"limit is {limit}; it should be at least 1")
    if few_shot is not None and few_shot < 0:
        raise SettingError(f"few-shot is {few_shot}; it should be at least 0")
    if log is not None and not log.parent.is_dir():
        raise SettingError(f"there is no folder {log.parent} for the log")
    names = [Path(word).stem for word in (*words, *asked_there)] + [path.stem for path in texts]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SettingError(f"two of what is measured are called {twice[0]}; name each once, or rename a file")


def _window(model: "LanguageModel", length: int | None, stride: int | None) -> tuple[int, int]:
    limit = model.config.max_position_embeddings
    length = min(WINDOW, limit) if length is None else length
    if not 1 <= length <= limit:
        raise SettingError(f"sequence-length is {length}; it should be 1 to {limit}, this model's context")
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise SettingError(f"stride is {stride}; it should be 1 to {length}, the length of a window")
    return length, stride


def _text(model: "LanguageModel", path: Path, length: int, stride: int) -> dict[str, Any]:
    """A text, or the held-out part of a corpus."""
    from smolforge.data.corpus import Corpus
    from smolforge.data.prepare.documents import read_text
    from smolforge.evaluation import measure_corpus, measure_text
    from smolforge.generation.stream import own

    if path.is_dir():
        corpus = Corpus.open(path)
        if corpus.facts["tokenizer"] != own(model).fingerprint:
            raise InvalidFile(f"the tokens of {path} were made with another tokenizer than this model's")
        return measure_corpus(model, corpus, length, stride=stride)
    if not path.is_file():
        raise InvalidFile(f"there is no text or corpus at {path}")
    content = read_text(path)
    if not content:
        raise InvalidFile(f"{path} is empty")
    total = len(own(model).encode(content))
    with ProgressBar(path.stem, total) as done:
        return measure_text(model, content, length, stride, done)


def _scored(model: "LanguageModel", task: "Task") -> list["Score"]:
    from smolforge.evaluation.multiple_choice import score

    with ProgressBar(task.name, sum(len(set(item.queries)) for item in task.items)) as done:
        return score(model, task.items, scored=done)


def _summary(scores: Sequence["Score"], task: "Task", few_shot: int) -> dict[str, Any]:
    from smolforge.evaluation.multiple_choice import summary

    return summary(scores) | {"few_shot": few_shot, "source": task.source}


def _found(names: Sequence[str]) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness, for `_harness`."""
    if not names:
        return {}
    with quiet_library("lm_eval"):
        from smolforge.evaluation import harness

        return harness.find(names)


def _harness(
    model: "LanguageModel", found: dict[str, Any], limit: int | None, few_shot: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Values and samples by task."""
    if not found:
        return {}, {}
    with quiet_library("lm_eval"):
        from smolforge.evaluation import harness

        return harness.run(model, found, limit, few_shot)


def _write(log: Path, scores: dict[str, list["Score"]], samples: dict[str, list[dict[str, Any]]]) -> None:
    lines = [json.dumps({"task": name, **score.as_json()}) for name, found in scores.items() for score in found]
    lines += [
        json.dumps({"task": name, "id": str(sample["doc_id"]), **sample}, default=str)
        for name, found in samples.items()
        for sample in found
    ]
    log.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line a task, one a text."""
    width, lines = max(map(len, results), default=0) + 2, []
    for name, found in results.items():
        if "acc" not in found:
            said = f"loss {found['loss']:.4f}  perplexity {found['perplexity']:.2f}  "
            said += (
                f"bits/byte {found['bits_per_byte']:.4f}  accuracy {found['accuracy']:.1%}  {found['tokens']:,} tokens"
            )
        else:
            said = "  ".join(_share(each, found) for each in ("acc", "acc_norm", "acc_chars")) + f"  n {found['n']:,}"
        lines.append(f"{name:<{width}}{said}")
    return lines


def _harness_lines(measured: dict[str, dict[str, Any]]) -> list[str]:
    """One line a task, its numbers as the harness has them."""
    width, lines = max(map(len, measured), default=0) + 2, []
    for name, found in measured.items():
        parts = [
            _number(key, found) for key in found if key not in ("n", "few_shot", "source") and "_stderr" not in key
        ]
        lines.append(f"{name:<{width}}{'  '.join(parts)}  n {found['n']:,}  ({found['source']})")
    return lines


def _number(key: str, found: dict[str, Any]) -> str:
    metric, comma, how = key.partition(",")
    value, error = found[key], found.get(f"{metric}_stderr{comma}{how}")
    said = f"{value:.4f}" if isinstance(value, float) else str(value)
    return f"{key} {said}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _share(name: str, found: dict[str, Any]) -> str:
    error = found[f"{name}_stderr"]
    return f"{name} {found[name]:.1%}" + ("" if error is None else f" ± {error:.1%}")
