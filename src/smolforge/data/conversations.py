"""Rows to conversations: each checked, as documents whose text is the conversation in one form.

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
{"prompt": "Hi", "completion": "Hello!"}                 the same; of a completion alone is learned,
{"prompt": [messages...], "completion": [messages...]}   and not what an assistant says in the prompt
"""

import json
from typing import Any

from smolforge.config import Data
from smolforge.data.documents import Document, group_of, whole
from smolforge.data.sources.rows import Row
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
