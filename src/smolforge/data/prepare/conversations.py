"""Rows to conversations: each checked, as documents whose text is the conversation in one form.

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
{"prompt": "Hi", "completion": "Hello!"}                 the same; of a completion alone is learned,
{"prompt": [messages...], "completion": [messages...]}   and not what an assistant says in the prompt

Rows to pairs of answers: each checked, as documents whose text is the pair in one form.

{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
{"prompt": [messages...], "chosen": [message], "rejected": [message]}    an answer each, to the same prompt
{"chosen": [messages..., message], "rejected": [messages..., message]}   whole conversations that differ in the last

The third is ultrafeedback_binarized's form; a prompt beside it, and whatever else a line has, is not read.
"""

import json
from typing import Any

from smolforge.config import Data
from smolforge.data.prepare.documents import Document, group_of, whole
from smolforge.data.sources.types import Row
from smolforge.errors import InvalidFile

ROLES = ("system", "user", "assistant", "tool")


def conversation_document(row: Row, data: Data) -> Document:
    """A conversation, to be read by `messages_of`. Raises InvalidFile, naming the place, for whatever is none."""
    messages, first = conversation(row.record, row.place)
    text = json.dumps({"messages": messages, "first": first}, ensure_ascii=False)
    return Document(group_of(row, data), whole(text, row.place), row.place, alone=data.group_key is None)


def messages_of(document: Document) -> tuple[list[dict[str, Any]], int]:
    """The messages of a conversation, and the number of the first that may be learned."""
    said = json.loads(document.text)
    return said["messages"], said["first"]


def conversation(record: Any, place: str) -> tuple[list[dict[str, Any]], int]:
    """The same of a line. Raises InvalidFile, beginning with `place`, for what is no conversation."""
    if isinstance(record, dict) and "messages" in record:
        messages = record["messages"]
        first = 0
    elif isinstance(record, dict) and {"prompt", "completion"} <= record.keys():
        prompt, messages = turns(record, "prompt", "user", place), turns(record, "completion", "assistant", place)
        first = len(prompt)
        messages = prompt + messages
    else:
        keys = record.keys() if isinstance(record, dict) else ()
        way_out = "; --data.format text reads plain text" if "text" in keys else ""
        way_out = "; --data.format pairs reads pairs of answers" if {"chosen", "rejected"} <= set(keys) else way_out
        raise InvalidFile(f"{place} is no conversation: it has neither messages nor a prompt and a completion{way_out}")
    check(messages, place)
    return [{key: value for key, value in message.items() if value is not None} for message in messages], first


def turns(record: dict[str, Any], key: str, role: str, place: str) -> list[Any]:
    """A prompt or completion as messages: a text is one, by `role`."""
    value = record[key]
    if not isinstance(value, str | list):
        raise InvalidFile(f"{place} has {_kind(value)} as its {key}; it should be text, or a list of messages")
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def check(messages: Any, place: str) -> None:
    """Raises InvalidFile for what no template could make a conversation of."""
    if not isinstance(messages, list) or not messages:
        what = "no message in it" if messages == [] else f"{_kind(messages)} as its messages"
        raise InvalidFile(f'{place} has {what}; it should be a list of {{"role": ..., "content": ...}}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise InvalidFile(f'{place}: message {number} is {_kind(message)}, not {{"role": ..., "content": ...}}')
        calls = message.get("role") == "assistant" and message.get("tool_calls")  # which may be all it says
        for key in ("role", "content"):
            if message.get(key) is None and not (key == "content" and calls):
                raise InvalidFile(f"{place}: message {number} has no {key}")
            if not isinstance(message.get(key), str | None):
                raise InvalidFile(f"{place}: the {key} of message {number} is {_kind(message[key])}; it should be text")
        if message["role"] not in ROLES:
            raise InvalidFile(
                f"{place}: message {number} has the role {message['role'][:40]!r}; it should be one of "
                f"{', '.join(ROLES)}"
            )
        if message["role"] == "system" and number > 1:
            raise InvalidFile(f"{place}: message {number} is a system message; there may be one, and it comes first")


def _kind(value: Any) -> str:
    """What a JSON value is."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


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
    whole_ones = [preference_conversation(record, key, place) for key in ANSWERS]
    for key, messages in zip(ANSWERS, whole_ones, strict=True):
        check_answer(messages, key, place)
    (*prompt, chosen), (*other, rejected) = whole_ones
    if prompt != other:
        raise InvalidFile(
            f"{place}: chosen and rejected answer different prompts; all messages before the last must be the same"
        )
    return prompt, chosen, rejected


def preference_conversation(record: dict[str, Any], key: str, place: str) -> Messages:
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
