"""Rows to pairs of answers: each checked, as documents whose text is the pair in one form.

{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
{"prompt": [messages...], "chosen": [message], "rejected": [message]}    an answer each, to the same prompt
{"chosen": [messages..., message], "rejected": [messages..., message]}   whole conversations that differ in the last

The third is ultrafeedback_binarized's form; a prompt beside it, and whatever else a line has, is not read.
"""

import json
from typing import Any

from smolforge.config import Data
from smolforge.data.conversations import check, turns
from smolforge.data.documents import Document, group_of, whole
from smolforge.data.sources.rows import Row
from smolforge.errors import InvalidFile

ANSWERS = ("chosen", "rejected")
Messages = list[dict[str, Any]]


def preference_document(row: Row, data: Data) -> Document:
    """A pair, to be read by `pair_of`. Those of one prompt stay together, unless data.group_key says what does.

    Raises InvalidFile, naming the place, for whatever is none.
    """
    prompt, chosen, rejected = pair(row.record, row.place)
    asked = json.dumps(prompt, ensure_ascii=False)
    text = json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}, ensure_ascii=False)
    group = asked if data.group_key is None else group_of(row, data)
    return Document(group, whole(text, row.place), row.place)


def pair_of(document: Document) -> tuple[Messages, Messages]:
    """Both conversations of a pair, which differ in their last message: the chosen one, and the rejected one."""
    said = json.loads(document.text)
    return [*said["prompt"], said["chosen"]], [*said["prompt"], said["rejected"]]


def is_empty(answer: dict[str, Any]) -> bool:
    """Whether an answer says nothing."""
    return not answer.get("content", "").strip() and not answer.get("tool_calls")


def pair(record: Any, place: str) -> tuple[Messages, dict[str, Any], dict[str, Any]]:
    """Prompt, chosen and rejected message of a line. Raises InvalidFile, beginning with `place`, for anything else."""
    if not isinstance(record, dict) or not set(ANSWERS) <= record.keys():
        talks = isinstance(record, dict) and ("messages" in record or "completion" in record)
        way_out = "; --data.format chat reads conversations" if talks else ""
        raise InvalidFile(f"{place} is no pair: it has not both chosen and rejected{way_out}")
    whole_ones = [conversation(record, key, place) for key in ANSWERS]
    for key, messages in zip(ANSWERS, whole_ones, strict=True):
        check_answer(messages, key, place)
    (*prompt, chosen), (*other, rejected) = whole_ones
    if prompt != other:
        raise InvalidFile(
            f"{place}: chosen and rejected answer different prompts; all messages before the last must be the same"
        )
    return prompt, chosen, rejected


def conversation(record: dict[str, Any], key: str, place: str) -> Messages:
    """The prompt and one of its answers as messages, checked."""
    answer = turns(record, key, "assistant", place)
    begins = answer[0].get("role") if answer and isinstance(answer[0], dict) else None
    if isinstance(record[key], str) or begins == "assistant":
        if record.get("prompt") is None:
            raise InvalidFile(f"{place} has no prompt that {key} would answer")
        answer = turns(record, "prompt", "user", place) + answer
    check(answer, f"{place}, {key}")
    return [{name: value for name, value in message.items() if value is not None} for message in answer]


def check_answer(messages: Messages, key: str, place: str) -> None:
    """Raises InvalidFile where the last message is no answer to others."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise InvalidFile(
            f"{place}: {key} ends with a message of the {last['role']}; it should be the assistant's answer"
        )
    if len(messages) < 2 or messages[-2]["role"] == "assistant":
        what = "answers nothing" if len(messages) < 2 else "goes on with what the assistant said"
        raise InvalidFile(f"{place}: {key} {what}; it should be one message after a prompt")
