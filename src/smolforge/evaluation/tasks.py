"""Load the items of a task: from a JSONL file, or from a data set on the Hub by the name of the task.

A line of a file is {"id", "query", "choices", "gold"}; `id` is optional, and `query` may be a list with one text for
each choice. Hub tasks have the prompts of lm-evaluation-harness. commonsense_qa and mmlu_cloze have those of SmolLM2's
authors (github.com/huggingface/smollm, text/evaluation/tasks.py): without letters, the model scores the answer's words.

PUBLISHED_SCORES are what SmolLM2's authors measured, for the tasks that are the same: zero-shot, normalized by
characters, whole splits, with lighteval in bfloat16 (the model cards, and text/evaluation in that repository). They
omit winogrande, where the authors score the whole end of the sentence with the name, and the Instruct models, which
they prompt through the chat template. Their HellaSwag keeps spaces that lm-evaluation-harness strips, so a few tenths
of a point are no difference between models.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from smolforge.data.prepare.documents import read_text
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, did_you_mean, install_command
from smolforge.evaluation.multiple_choice import DELIMITER, Item

DatasetRow = dict[str, Any]
EXAMPLE_SEPARATOR = "\n\n"
PUBLISHED_TASKS = ("hellaswag", "arc", "piqa", "mmlu_cloze", "commonsense_qa", "openbookqa")
PUBLISHED_SCORES = {
    "HuggingFaceTB/SmolLM2-135M": (42.1, 43.9, 68.4, 31.5, 33.9, 34.6),
    "HuggingFaceTB/SmolLM-135M": (41.2, 42.4, 68.4, 30.2, 32.7, 34.0),
    "HuggingFaceTB/SmolLM2-360M": (54.5, 53.0, 71.7, 35.8, 38.0, 37.4),
    "HuggingFaceTB/SmolLM2-1.7B": (68.7, 60.5, 77.6, None, 43.6, 42.2),
}
ARC_TASKS = ("arc_easy", "arc_challenge")


class Prompted(NamedTuple):
    """The prompts of one row: `queries` has one text for all choices, or one for each."""

    queries: Sequence[str]
    choices: Sequence[str]
    gold: int


@dataclass(frozen=True)
class HubTask:
    """A data set on the Hub, and how its rows become prompts. `examples` is the split of the few-shot examples."""

    path: str
    subset: str | None
    split: str
    examples_split: str | None
    to_prompt: Callable[[DatasetRow], Prompted]


class Task(NamedTuple):
    """Items to measure on; `source` says where they are from, as exactly as is known."""

    name: str
    items: list[Item]
    source: str


def hellaswag(row: DatasetRow) -> Prompted:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Prompted([_without_brackets(context)], list(map(_without_brackets, row["endings"])), int(row["label"]))


def _without_brackets(text: str) -> str:
    """Without what WikiHow's markup left in HellaSwag."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def labelled(question: str) -> Callable[[DatasetRow], Prompted]:
    """Return the prompts of rows with labelled choices, for a question with the names of fields."""

    def to_prompt(row: DatasetRow) -> Prompted:
        gold = row["choices"]["label"].index(row["answerKey"].strip())
        return Prompted([question.format_map(row)], row["choices"]["text"], gold)

    return to_prompt


def piqa(row: DatasetRow) -> Prompted:
    return Prompted([f"Question: {row['goal']}\nAnswer:"], [row["sol1"], row["sol2"]], int(row["label"]))


def winogrande(row: DatasetRow) -> Prompted:
    """The same end of a sentence, behind each name."""
    before, after = row["sentence"].split("_", 1)
    names = [row["option1"], row["option2"]]
    return Prompted([before + name for name in names], [after.strip()] * 2, int(row["answer"]) - 1)


def lambada(row: DatasetRow) -> Prompted:
    """The last word, to be found by greedy decoding."""
    before, _, word = row["text"].rpartition(" ")
    return Prompted([before], [word], 0)


def mmlu_cloze(row: DatasetRow) -> Prompted:
    topic = row["subject"].replace("_", " ")
    query = f"The following are questions about {topic}.\nQuestion: {row['question']}\nAnswer:"
    return Prompted([query], row["choices"], int(row["answer"]))


ARC = labelled("Question: {question}\nAnswer:")
HUB_TASKS = {
    "hellaswag": HubTask("Rowan/hellaswag", None, "validation", "train", hellaswag),
    "arc_easy": HubTask("allenai/ai2_arc", "ARC-Easy", "test", "train", ARC),
    "arc_challenge": HubTask("allenai/ai2_arc", "ARC-Challenge", "test", "train", ARC),
    "piqa": HubTask("baber/piqa", None, "validation", "train", piqa),
    "winogrande": HubTask("allenai/winogrande", "winogrande_xl", "validation", "train", winogrande),
    "openbookqa": HubTask("allenai/openbookqa", "main", "test", "train", labelled("{question_stem}")),
    "commonsense_qa": HubTask("tau/commonsense_qa", None, "validation", "train", labelled("{question}")),
    "lambada": HubTask("EleutherAI/lambada_openai", "default", "test", None, lambada),
    "mmlu_cloze": HubTask("cais/mmlu", "all", "test", "dev", mmlu_cloze),
}


def load_task(name_or_path: str, limit: int | None = None, few_shot: int = 0) -> Task:
    """Return the task of a name or a file: its first `limit` items, each after `few_shot` examples with answers.

    Examples are the first of a Hub task's training split, or the first items of a file, which are then not measured.
    Raises ConfigError for an unknown name, InvalidFileError for a missing or malformed file, MissingResourceError if
    a package or the Hub is missing.
    """
    path = Path(name_or_path)
    if path.is_file():
        items = read_items(path)
        name, source = path.stem, f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        examples, items = items[:few_shot], items[few_shot:]
    elif name_or_path in HUB_TASKS:
        hub_task = HUB_TASKS[name_or_path]
        if few_shot and hub_task.examples_split is None:
            raise ConfigError(f"{name_or_path} has no examples to show; leave --few-shot out")
        name, source = name_or_path, f"{hub_task.path} {hub_task.subset or 'default'} {hub_task.split}"
        items = read_task_rows(name_or_path, hub_task.split, limit)
        examples = (
            read_task_rows(name_or_path, hub_task.examples_split, few_shot)
            if few_shot and hub_task.examples_split
            else []
        )
    elif path.suffix or len(path.parts) > 1:
        raise InvalidFileError(f"there is no file of items at {name_or_path}")
    else:
        known_names = ", ".join(HUB_TASKS) + "." + did_you_mean(name_or_path, HUB_TASKS)
        raise ConfigError(f"there is no task {name_or_path!r}: a task is a .jsonl file or one of {known_names}")
    if not items:
        raise ConfigError(
            f"{name_or_path} has {len(examples)} items, and --few-shot {few_shot} shows them all; show fewer"
        )
    prefix = "".join(f"{example(item)}{EXAMPLE_SEPARATOR}" for item in examples)
    prompted = [replace(item, queries=tuple(prefix + query for query in item.queries)) for item in items[:limit]]
    return Task(name, prompted, source)


def example(item: Item) -> str:
    """Return the text of an item with its answer."""
    query, choice = item.pairs()[item.gold]
    return query + DELIMITER + choice


def read_items(path: Path) -> list[Item]:
    """Read all items of a JSONL file. Raises InvalidFileError, naming file and line, for a line that is not an item."""
    # Not splitlines: JSON may hold line separators of Unicode.
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise InvalidFileError(f"{path} has no items; a line is {{'id', 'query', 'choices', 'gold'}}")
    return [_parse_item(line, f"{path}, line {number}", str(number)) for number, line in lines]


def _parse_item(line: str, location: str, number: str) -> Item:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidFileError(f"{location} has half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{location} is not JSON: {error}") from None
    if not isinstance(row, dict) or not {"query", "choices", "gold"} <= row.keys():
        raise InvalidFileError(f"{location} is no item; it should have query, choices and gold")
    query, choices, gold = row["query"], row["choices"], row["gold"]
    queries = [query] if isinstance(query, str) else query
    if not _is_text_list(choices) or not all(map(str.strip, choices)):
        raise InvalidFileError(
            f"{location}: choices is {_shown(choices)}; it should be a list of texts, none of them empty"
        )
    if not _is_text_list(queries) or len(queries) not in (1, len(choices)):
        raise InvalidFileError(
            f"{location}: query is {_shown(query)}; it should be a text, or a list of one for each choice"
        )
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise InvalidFileError(
            f"{location}: gold is {_shown(gold)}; it should be the number of a choice, 0 to {len(choices) - 1}"
        )
    return Item(str(row.get("id", number)), tuple(queries), tuple(choices), gold, location)


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def read_task_rows(name: str, split: str, limit: int | None = None) -> list[Item]:
    """Load the first items of one split of a Hub task, from the Hub or its cache."""
    task = HUB_TASKS[name]
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingResourceError(
            f"reading {name} from the Hub needs the package datasets: {install_command('data')} "
            "(a .jsonl file of items needs nothing)"
        ) from None
    try:
        dataset: Any = load_dataset(task.path, task.subset, split=split)
        records = dataset.select(range(min(limit or len(dataset), len(dataset)))).to_list()
    except Exception as error:  # the library raises its own, OSError and ValueError
        message = " ".join(str(error).split())[:200]
        raise MissingResourceError(f"{name} could not be read from {task.path} on the Hub: {message}") from None
    return [
        _dataset_item(task.to_prompt, row, f"{name} {split}, row {number}", number=number)
        for number, row in enumerate(records)
    ]


def _dataset_item(to_prompt: Callable[[DatasetRow], Prompted], row: DatasetRow, location: str, *, number: int) -> Item:
    try:
        queries, choices, gold = to_prompt(row)
        return Item(str(number), tuple(queries), tuple(choices), gold, location)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidFileError(f"{location} has another form than this version reads: {error!r}") from None


def published_scores(model: str, accuracies: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return (measured, published) accuracy by task for a model's Hub id; `arc` is the mean of its two halves."""
    scores = PUBLISHED_SCORES.get(model.split("@")[0], ())
    measured = dict(accuracies)
    if set(ARC_TASKS) <= accuracies.keys():
        measured["arc"] = sum(accuracies[name] for name in ARC_TASKS) / len(ARC_TASKS)
    reported = dict(zip(PUBLISHED_TASKS, scores, strict=False))
    return {
        name: (measured[name], score / 100)
        for name, score in reported.items()
        if name in measured and score is not None
    }
