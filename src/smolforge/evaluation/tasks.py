"""Where items come from: a JSONL file here, or a data set on the Hub by the name of its task.

A line of a file is {"id", "query", "choices", "gold"}; `id` may be left out, and `query` may be a list with one text
for each choice. Named tasks are asked as lm-evaluation-harness asks them, with two exceptions that are asked as
SmolLM2's authors did (github.com/huggingface/smollm, text/evaluation/tasks.py): commonsense_qa and mmlu_cloze name
no letters, the model is to find the answer's words.

What SmolLM2's authors measured, where a task here is theirs.

Zero-shot, normalised by characters, whole splits, with lighteval in bfloat16: the model cards, and
text/evaluation in github.com/huggingface/smollm. Left out are winogrande, where they score the whole end of the
sentence with the name, and the Instruct models, which they ask through the chat template. Their HellaSwag keeps
spaces that lm-evaluation-harness strips, so a few tenths of a point are no difference between models.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from smolforge.data.prepare.documents import read_text
from smolforge.errors import InvalidFile, MissingResource, SettingError, did_you_mean
from smolforge.evaluation.multiple_choice import DELIMITER, Item

Row = dict[str, Any]
BETWEEN_EXAMPLES = "\n\n"


class Asked(NamedTuple):
    """What is asked of one row: `queries` has one text for all choices, or one for each."""

    queries: Sequence[str]
    choices: Sequence[str]
    gold: int


@dataclass(frozen=True)
class Named:
    """A data set on the Hub, and how its rows are asked. `examples` is the split that few-shot examples are from."""

    path: str
    subset: str | None
    split: str
    examples: str | None
    ask: Callable[[Row], Asked]


class Task(NamedTuple):
    """Items to measure on; `source` says where they are from, as exactly as is known."""

    name: str
    items: list[Item]
    source: str


def hellaswag(row: Row) -> Asked:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Asked([_without_brackets(context)], list(map(_without_brackets, row["endings"])), int(row["label"]))


def _without_brackets(text: str) -> str:
    """Without what WikiHow's markup left in HellaSwag."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def arc(row: Row) -> Asked:
    gold = row["choices"]["label"].index(row["answerKey"])
    return Asked([f"Question: {row['question']}\nAnswer:"], row["choices"]["text"], gold)


def piqa(row: Row) -> Asked:
    return Asked([f"Question: {row['goal']}\nAnswer:"], [row["sol1"], row["sol2"]], int(row["label"]))


def winogrande(row: Row) -> Asked:
    """The same end of a sentence, behind each name."""
    before, after = row["sentence"].split("_", 1)
    names = [row["option1"], row["option2"]]
    return Asked([before + name for name in names], [after.strip()] * 2, int(row["answer"]) - 1)


def openbookqa(row: Row) -> Asked:
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return Asked([row["question_stem"]], row["choices"]["text"], gold)


def commonsense_qa(row: Row) -> Asked:
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return Asked([row["question"]], row["choices"]["text"], gold)


def lambada(row: Row) -> Asked:
    """The last word, to be found by greedy decoding."""
    before, _, word = row["text"].rpartition(" ")
    return Asked([before], [word], 0)


def mmlu_cloze(row: Row) -> Asked:
    topic = row["subject"].replace("_", " ")
    query = f"The following are questions about {topic}.\nQuestion: {row['question']}\nAnswer:"
    return Asked([query], row["choices"], int(row["answer"]))


NAMED = {
    "hellaswag": Named("Rowan/hellaswag", None, "validation", "train", hellaswag),
    "arc_easy": Named("allenai/ai2_arc", "ARC-Easy", "test", "train", arc),
    "arc_challenge": Named("allenai/ai2_arc", "ARC-Challenge", "test", "train", arc),
    "piqa": Named("baber/piqa", None, "validation", "train", piqa),
    "winogrande": Named("allenai/winogrande", "winogrande_xl", "validation", "train", winogrande),
    "openbookqa": Named("allenai/openbookqa", "main", "test", "train", openbookqa),
    "commonsense_qa": Named("tau/commonsense_qa", None, "validation", "train", commonsense_qa),
    "lambada": Named("EleutherAI/lambada_openai", "default", "test", None, lambada),
    "mmlu_cloze": Named("cais/mmlu", "all", "test", "dev", mmlu_cloze),
}


def find(word: str, limit: int | None = None, few_shot: int = 0) -> Task:
    """The task that a name or a file means, its first `limit` items, each behind `few_shot` examples with answers.

    Examples are the first of a named task's training split; of a file its first items, which are then not measured.
    Raises SettingError for a name that is none, InvalidFile for a file that is missing or malformed,
    MissingResource where a package or the Hub is.
    """
    path = Path(word)
    if path.is_file():
        items = read_items(path)
        name, source = path.stem, f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        examples, items = items[:few_shot], items[few_shot:]
    elif word in NAMED:
        named = NAMED[word]
        if few_shot and named.examples is None:
            raise SettingError(f"{word} has no examples to show; leave --few-shot out")
        name, source = word, f"{named.path} {named.subset or 'default'} {named.split}"
        items = rows(word, named.split, limit)
        examples = rows(word, named.examples, few_shot) if few_shot and named.examples else []
    elif path.suffix or len(path.parts) > 1:
        raise InvalidFile(f"there is no file of items at {word}")
    else:
        known = ", ".join(NAMED) + "." + did_you_mean(word, NAMED)
        raise SettingError(f"there is no task {word!r}: a task is a .jsonl file or one of {known}")
    if not items:
        raise SettingError(f"{word} has {len(examples)} items, and --few-shot {few_shot} shows them all; show fewer")
    shown = "".join(f"{example(item)}{BETWEEN_EXAMPLES}" for item in examples)
    asked = [replace(item, queries=tuple(shown + query for query in item.queries)) for item in items[:limit]]
    return Task(name, asked, source)


def example(item: Item) -> str:
    """An item with its answer."""
    query, choice = item.pairs()[item.gold]
    return query + DELIMITER + choice


def read_items(path: Path) -> list[Item]:
    """All items of a JSONL file. Raises InvalidFile, naming file and line, for whatever is none."""
    # Not splitlines: JSON may hold line separators of Unicode.
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise InvalidFile(f"{path} has no items; a line is {{'id', 'query', 'choices', 'gold'}}")
    return [_item(line, f"{path}, line {number}", str(number)) for number, line in lines]


def _item(line: str, place: str, number: str) -> Item:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidFile(f"{place} has half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict) or not {"query", "choices", "gold"} <= row.keys():
        raise InvalidFile(f"{place} is no item; it should have query, choices and gold")
    query, choices, gold = row["query"], row["choices"], row["gold"]
    queries = [query] if isinstance(query, str) else query
    if not _texts(choices) or not all(map(str.strip, choices)):
        raise InvalidFile(f"{place}: choices is {_shown(choices)}; it should be a list of texts, none of them empty")
    if not _texts(queries) or len(queries) not in (1, len(choices)):
        raise InvalidFile(f"{place}: query is {_shown(query)}; it should be a text, or a list of one for each choice")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise InvalidFile(
            f"{place}: gold is {_shown(gold)}; it should be the number of a choice, 0 to {len(choices) - 1}"
        )
    return Item(str(row.get("id", number)), tuple(queries), tuple(choices), gold, place)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def rows(name: str, split: str, limit: int | None = None) -> list[Item]:
    """The first items of one split of a named task, from the Hub or its cache."""
    task = NAMED[name]
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingResource(
            f"reading {name} from the Hub needs the package datasets: pip install 'smolforge[data]' "
            "(a .jsonl file of items needs nothing)"
        ) from None
    try:
        found: Any = load_dataset(task.path, task.subset, split=split)
        read = found.select(range(min(limit or len(found), len(found)))).to_list()
    except Exception as error:  # the library raises its own, OSError and ValueError
        said = " ".join(str(error).split())[:200]
        raise MissingResource(f"{name} could not be read from {task.path} on the Hub: {said}") from None
    return [_asked(task.ask, row, f"{name} {split}, row {number}", number) for number, row in enumerate(read)]


def _asked(ask: Callable[[Row], Asked], row: Row, place: str, number: int) -> Item:
    try:
        queries, choices, gold = ask(row)
        return Item(str(number), tuple(queries), tuple(choices), gold, place)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidFile(f"{place} has another form than this version reads: {error!r}") from None


TASKS = ("hellaswag", "arc", "piqa", "mmlu_cloze", "commonsense_qa", "openbookqa")
SCORES = {
    "HuggingFaceTB/SmolLM2-135M": (42.1, 43.9, 68.4, 31.5, 33.9, 34.6),
    "HuggingFaceTB/SmolLM-135M": (41.2, 42.4, 68.4, 30.2, 32.7, 34.0),
    "HuggingFaceTB/SmolLM2-360M": (54.5, 53.0, 71.7, 35.8, 38.0, 37.4),
    "HuggingFaceTB/SmolLM2-1.7B": (68.7, 60.5, 77.6, None, 43.6, 42.2),
}
ARC = ("arc_easy", "arc_challenge")


def published(model: str, found: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """(ours, theirs) by task for a model by its Hub id, from ours by task; `arc` is the mean of its two halves."""
    scores = SCORES.get(model.split("@")[0], ())
    ours = dict(found)
    if set(ARC) <= found.keys():
        ours["arc"] = sum(found[name] for name in ARC) / len(ARC)
    theirs = dict(zip(TASKS, scores, strict=False))
    return {name: (ours[name], score / 100) for name, score in theirs.items() if name in ours and score is not None}
