"""Parse and check rows that are conversations, or preference pairs, into documents in one JSON form.

Conversations (data.format chat):

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
{"prompt": "Hi", "completion": "Hello!"}                 the same; only the completion is learned,
{"prompt": [messages...], "completion": [messages...]}   and not what an assistant says in the prompt

Pairs (data.format pairs):

{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
{"prompt": [messages...], "chosen": [message], "rejected": [message]}    an answer each, to the same prompt
{"chosen": [messages..., message], "rejected": [messages..., message]}   whole conversations that differ in the last

The last is ultrafeedback_binarized's form; a prompt next to it, and whatever else a line has, is not read.
"""

import json
from typing import Any

from smolforge.config import Data
from smolforge.data.prepare.documents import Document, check_surrogates, group_of
from smolforge.data.sources.types import SourceRow
from smolforge.errors import InvalidFileError

ROLES = ("system", "user", "assistant", "tool")
ANSWER_KEYS = ("chosen", "rejected")
Messages = list[dict[str, Any]]


def conversation_document(row: SourceRow, data: Data) -> Document:
    """Return a conversation, to be read by `messages_of`.

    Raises InvalidFileError, with the location, for anything else.
    """
    messages, first = parse_conversation(row.record, row.location)
    text = json.dumps({"messages": messages, "first": first}, ensure_ascii=False)
    return Document(
        group_of(row, data), check_surrogates(text, row.location), row.location, ungrouped=data.group_key is None
    )


def messages_of(document: Document) -> tuple[list[dict[str, Any]], int]:
    """Return the messages of a conversation, and the number of the first that may be learned."""
    content = json.loads(document.text)
    return content["messages"], content["first"]


def parse_conversation(record: Any, location: str) -> tuple[list[dict[str, Any]], int]:
    """Parse a record to messages, and the number of the first that may be learned. Raises InvalidFileError."""
    if isinstance(record, dict) and "messages" in record:
        messages = record["messages"]
        first = 0
    elif isinstance(record, dict) and {"prompt", "completion"} <= record.keys():
        prompt, messages = (
            as_messages(record, "prompt", "user", location=location),
            as_messages(record, "completion", "assistant", location=location),
        )
        first = len(prompt)
        messages = prompt + messages
    else:
        keys = record.keys() if isinstance(record, dict) else ()
        hint = "; --data.format text reads plain text" if "text" in keys else ""
        hint = "; --data.format pairs reads pairs of answers" if {"chosen", "rejected"} <= set(keys) else hint
        raise InvalidFileError(
            f"{location} is no conversation: it has neither messages nor a prompt and a completion{hint}"
        )
    check_messages(messages, location)
    return without_nulls(messages), first


def as_messages(record: dict[str, Any], key: str, role: str, *, location: str) -> list[Any]:
    """Return a prompt or completion as messages: a text is one message by `role`."""
    value = record[key]
    if not isinstance(value, str | list):
        raise InvalidFileError(
            f"{location} has {_json_type(value)} as its {key}; it should be text, or a list of messages"
        )
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def check_messages(messages: Any, location: str) -> None:
    """Raise InvalidFileError for messages that no chat template could render."""
    if not isinstance(messages, list) or not messages:
        problem = "no message in it" if messages == [] else f"{_json_type(messages)} as its messages"
        raise InvalidFileError(f'{location} has {problem}; it should be a list of {{"role": ..., "content": ...}}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise InvalidFileError(
                f'{location}: message {number} is {_json_type(message)}, not {{"role": ..., "content": ...}}'
            )
        calls = message.get("role") == "assistant" and message.get("tool_calls")  # which may be all it says
        for key in ("role", "content"):
            if message.get(key) is None and not (key == "content" and calls):
                raise InvalidFileError(f"{location}: message {number} has no {key}")
            if not isinstance(message.get(key), str | None):
                raise InvalidFileError(
                    f"{location}: the {key} of message {number} is {_json_type(message[key])}; it should be text"
                )
        if message["role"] not in ROLES:
            raise InvalidFileError(
                f"{location}: message {number} has the role {message['role'][:40]!r}; it should be one of "
                f"{', '.join(ROLES)}"
            )
        if message["role"] == "system" and number > 1:
            raise InvalidFileError(
                f"{location}: message {number} is a system message; there may be one, and it comes first"
            )


def preference_document(row: SourceRow, data: Data) -> Document:
    """Return a pair, to be read by `pair_of`. Pairs of one prompt are one group, unless data.group_key says otherwise.

    Raises InvalidFileError, with the location, for anything else.
    """
    prompt, chosen, rejected = parse_pair(row.record, row.location)
    prompt_json = json.dumps(prompt, ensure_ascii=False)
    text = json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}, ensure_ascii=False)
    group = prompt_json if data.group_key is None else group_of(row, data)
    return Document(group, check_surrogates(text, row.location), row.location)


def pair_of(document: Document) -> tuple[Messages, Messages]:
    """Return both conversations of a pair, chosen and rejected, which differ in their last message."""
    content = json.loads(document.text)
    return [*content["prompt"], content["chosen"]], [*content["prompt"], content["rejected"]]


def is_empty(answer: dict[str, Any]) -> bool:
    """Return whether an answer is empty."""
    return not answer.get("content", "").strip() and not answer.get("tool_calls")


def parse_pair(record: Any, location: str) -> tuple[Messages, dict[str, Any], dict[str, Any]]:
    """Parse a record to its prompt, chosen message and rejected message. Raises InvalidFileError."""
    if not isinstance(record, dict) or not set(ANSWER_KEYS) <= record.keys():
        is_conversation = isinstance(record, dict) and ("messages" in record or "completion" in record)
        hint = "; --data.format chat reads conversations" if is_conversation else ""
        raise InvalidFileError(f"{location} is no pair: it has not both chosen and rejected{hint}")
    conversations = [answered_conversation(record, key, location) for key in ANSWER_KEYS]
    for key, messages in zip(ANSWER_KEYS, conversations, strict=True):
        check_answer(messages, key, location)
    (*prompt, chosen), (*other_prompt, rejected) = conversations
    if prompt != other_prompt:
        raise InvalidFileError(
            f"{location}: chosen and rejected answer different prompts; all messages before the last must be the same"
        )
    return prompt, chosen, rejected


def answered_conversation(record: dict[str, Any], key: str, location: str) -> Messages:
    """Return the prompt and one of its answers as messages, checked."""
    answer = as_messages(record, key, "assistant", location=location)
    first_role = answer[0].get("role") if answer and isinstance(answer[0], dict) else None
    if isinstance(record[key], str) or first_role == "assistant":
        if record.get("prompt") is None:
            raise InvalidFileError(f"{location} has no prompt that {key} would answer")
        answer = as_messages(record, "prompt", "user", location=location) + answer
    check_messages(answer, f"{location}, {key}")
    return without_nulls(answer)


def without_nulls(messages: Messages) -> Messages:
    """Leave out the keys of messages that have no value."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def check_answer(messages: Messages, key: str, location: str) -> None:
    """Raise InvalidFileError where the last message is not an answer to a prompt."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise InvalidFileError(
            f"{location}: {key} ends with a message of the {last['role']}; it should be the assistant's answer"
        )
    if len(messages) < 2 or messages[-2]["role"] == "assistant":
        problem = "answers nothing" if len(messages) < 2 else "goes on with what the assistant said"
        raise InvalidFileError(f"{location}: {key} {problem}; it should be one message after a prompt")


def _json_type(value: Any) -> str:
    """Name the type of a JSON value."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
