"""The files beside a tokenizer.json in; settings that are what they should be out, or one sentence why not."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from smolforge.errors import InvalidFileError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
MAX_GROWTH = 64
MAX_FILE_BYTES = {"tokenizer.json": 64 << 20, "tokenizer_config.json": 4 << 20, "chat_template.jinja": 1 << 20}
"""In bytes. The largest vocabularies there are take 35 MB."""


def read_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, and special_tokens_map.json of tokens that are not named there."""
    settings, token_map = (_read_object(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    return {key: token_map[key] for key in NAMED_TOKENS if key in token_map} | settings


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    if not file.is_file():
        return {}
    content = read_utf8_file(file)
    try:
        settings = json.loads(content)
        json.dumps(settings, ensure_ascii=False).encode()  # half a character can be written in JSON, and nowhere else
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{file} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InvalidFileError(f"{file} is not a JSON object")
    return settings


def read_utf8_file(file: Path) -> str:
    check_size(file)
    try:
        return file.read_text("utf-8")
    except (ValueError, OSError) as error:
        raise InvalidFileError(f"{file} cannot be read: {error}") from None


def check_size(file: Path) -> None:
    """A file far larger than any real one is refused before it is read."""
    size, max_bytes = file.stat().st_size, MAX_FILE_BYTES.get(file.name, MAX_FILE_BYTES["tokenizer.json"])
    if size > max_bytes:
        raise InvalidFileError(f"{file} has {size:,} bytes, more than the {max_bytes:,} of any real one")


def parse_backend(content: str, problem: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json. Raises InvalidFileError, which begins with the problem."""
    try:
        return tokenizers.Tokenizer.from_str(content)
    except BaseException as error:  # the library raises bare Exception for a bad file, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidFileError(f"{problem}: {str(error)[:200]}") from None


def checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a tokenizer_config.json.

    Raises InvalidFileError where one that is read has a wrong type.
    """
    for key in NAMED_TOKENS:
        token = settings.get(key)
        if not isinstance(token["content"] if isinstance(token, dict) and "content" in token else token, str | None):
            raise InvalidFileError(f"the tokenizer_config.json has {str(token)[:80]} as {key}, which should be a text")
    template, added = settings.get("chat_template"), settings.get("added_tokens_decoder")
    single = [] if template is None else [{"name": "default", "template": template}]
    entries = template if isinstance(template, list) else single
    for entry in entries:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise InvalidFileError(
                "the chat_template of the tokenizer_config.json should be a text, or a list of such by name"
            )
    if not isinstance(added, dict | None):
        raise InvalidFileError("the added_tokens_decoder of the tokenizer_config.json should be a JSON object")
    return settings


def bos_ids_of(post_processor: Any) -> list[int]:
    """Return the ids that the post_processor of a tokenizer.json adds before a text: one, BOS, or none.

    Raises InvalidFileError for a post_processor that adds anything else.
    """
    ids, steps = [], [post_processor]
    for step in steps:
        match step:
            case None | {"type": "ByteLevel"}:
                pass
            case {"type": "Sequence", "processors": processors}:
                steps += processors
            case {
                "type": "TemplateProcessing",
                "single": [*before, {"Sequence": {"id": "A"}}],
                "special_tokens": tokens,
            }:
                ids += [number for piece in before for number in tokens[piece["SpecialToken"]["id"]]["ids"]]
            case _:
                raise InvalidFileError(
                    f"the tokenizer's post_processor ({step.get('type')}) adds more to a text than one token before "
                    "it, and after an end no text can go on; use a tokenizer.json that adds BOS or nothing"
                )
    if len(ids) > 1:
        raise InvalidFileError(
            f"the tokenizer's post_processor adds {len(ids)} tokens before a text; use a tokenizer.json that adds one"
        )
    return ids


def check_growth(normalizer: Any) -> None:
    """Refuse a normalizer whose replacements, one after the other, could make a text many times longer."""
    growth, steps = 1, [normalizer]
    for step in steps:
        if isinstance(step, dict):
            steps += step.get("normalizers", [])
            growth *= max(1, len(str(step.get("content", ""))))
    if growth > MAX_GROWTH:
        raise InvalidFileError(
            f"the normalizer of the tokenizer may make a text {growth:,} times longer; none needs that"
        )
