"""A tokenizer as llama.cpp has it, in the values of a .gguf: every token by its id, the merges, and a name.

The name stands for code of llama.cpp that cuts text into words (llama-vocab.cpp: tokenizer_pre), so only tokenizers
that cut as one of those does can be said. Keys and kinds of token as conversion/base.py of llama.cpp writes them.
"""

import json
from collections.abc import Container, Mapping
from typing import Any

from smolforge.errors import ConfigError, InvalidFileError
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.files import MAX_FILE_BYTES, parse_backend

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS = {"smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]}, "gpt-2": _BYTES}
"""llama.cpp's name to the tokenizers library's steps, for what is written and read here."""
DECODER = _BYTES | {"add_prefix_space": True}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of token: learned, special, added as ordinary text, and none at all."""
BPE_SETTINGS = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
TOKEN_ID_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # so spelled in every file
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
EXTRA_EOS_KEYS = ("eot_token_id", "eom_token_id")
"""Where a second and a third token that ends an answer are named: the end of a turn, and of a message."""
MAX_ADDED_TOKENS = 1 << 14
"""Special and added tokens together; each costs time in every text."""
PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"


def to_values(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What a .gguf says of a tokenizer whose model has so many ids. Raises ConfigError for one llama.cpp has not."""
    pipeline = json.loads(tokenizer.backend.to_str())
    tokens, kinds = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[number], kinds[number] = token, NORMAL
    for number, token in tokenizer.backend.get_added_tokens_decoder().items():
        kinds[number] = CONTROL if token.special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in pipeline["model"].get("merges", [])]
    token_names = ((key, tokenizer.named_token(token)) for token, key in TOKEN_ID_KEYS.items())
    ids = {PREFIX + key: tokenizer.backend.token_to_id(token) for key, token in token_names if token is not None}
    return {
        PREFIX + "model": "gpt2",
        PREFIX + "pre": pre_tokenizer_name(pipeline),
        PREFIX + "tokens": tokens,
        PREFIX + "token_type": kinds,
        PREFIX + "merges": merges,
        **{key: number for key, number in ids.items() if number is not None},
        **extra_eos_values(tokenizer),
        PREFIX + "add_bos_token": bool(tokenizer.bos_ids),
        PREFIX + "add_space_prefix": False,
        **({TEMPLATE: tokenizer.template.source} if tokenizer.template else {}),
    }


def extra_eos_values(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the keys of the ends of an answer beside eos_token_id. Raises ConfigError for more than there are keys."""
    ids = tokenizer.eos_ids[1:]
    if len(ids) > len(EXTRA_EOS_KEYS):
        raise ConfigError(
            f"the tokens {', '.join(map(str, tokenizer.eos_ids))} all end an answer of this model, and a .gguf names "
            f"{1 + len(EXTRA_EOS_KEYS)} at most; leave some out of eos_token_id in its generation_config.json"
        )
    return {PREFIX + key: number for key, number in zip(EXTRA_EOS_KEYS, ids, strict=False)}


def pre_tokenizer_name(pipeline: dict[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises ConfigError where it has none."""
    model = pipeline["model"] | {"normalizer": pipeline["normalizer"]}
    unsupported = [
        key
        for key, value in (BPE_SETTINGS | {"normalizer": None}).items()
        if (model.get(key) or None) != (value or None)
    ]
    steps = json.loads(json.dumps(pipeline["pre_tokenizer"]).replace('"trim_offsets": false', '"trim_offsets": true'))
    name = next((name for name, steps_of_name in PRE_TOKENIZERS.items() if steps_of_name == steps), None)
    if name is None or unsupported:
        problem = (
            f"its {unsupported[0]} is not GPT-2's"
            if unsupported
            else f"it cuts text as none of {', '.join(PRE_TOKENIZERS)} does"
        )
        raise ConfigError(
            f"llama.cpp has no name for this tokenizer: {problem}. It would read text otherwise without a word; "
            "--to transformers hands the model on with its own"
        )
    return name


def from_values(values: Mapping[str, Any], location: str, vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer of a .gguf whose model has so many ids, None where there is none.

    Raises InvalidFileError where it is broken or of another kind.
    """
    metadata = {key.removeprefix(PREFIX): value for key, value in values.items() if key.startswith(PREFIX)}
    if "model" not in metadata:
        return None
    kind, cut = str(metadata["model"]), str(metadata.get("pre"))
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        raise InvalidFileError(
            f"{location} has a tokenizer of llama.cpp's kind {kind[:40]!r}, {cut[:40]!r}, which is not read; gpt2 with "
            f"{' or '.join(PRE_TOKENIZERS)} is. The folder it was converted from has the same as tokenizer.json"
        )
    vocabulary, kinds = vocabulary_and_types(metadata, location, vocab_size)
    merges = typed_list(metadata, "merges", str, location=location)
    added = [
        added_token(token, number, kinds[number]) for token, number in vocabulary.items() if kinds[number] != NORMAL
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[cut],
        "post_processor": bos_processor(metadata, vocabulary, location=location),
        "decoder": DECODER,
        "model": BPE_SETTINGS | {"vocab": vocabulary, "merges": merges},
    }
    backend = parse_backend(json.dumps(content), f"{location} has a tokenizer that is broken")
    tokenizer = Tokenizer(backend, settings_of(metadata, values.get(TEMPLATE), vocabulary, location=location))
    ids = [token_id(metadata, key, vocabulary.values(), location=location) for key in EXTRA_EOS_KEYS if key in metadata]
    return tokenizer.with_eos_ids(ids)


def bos_processor(
    metadata: Mapping[str, Any], vocabulary: Mapping[str, int], *, location: str
) -> dict[str, Any] | None:
    """Return the post_processor that adds BOS, None where a file asks for none. Raises InvalidFileError for an end."""
    added = {key: metadata.get(f"add_{key}_token", False) for key in ("bos", "eos", "sep")}
    wrong = [key for key, value in added.items() if type(value) is not bool or (value and key != "bos")]
    if wrong:
        raise InvalidFileError(
            f"{location} has {PREFIX}add_{wrong[0]}_token {str(added[wrong[0]])[:40]}; add_bos_token may be true or "
            "false, and after an end that is added to each prompt no text could go on"
        )
    if not added["bos"]:
        return None
    number = token_id(metadata, "bos_token_id", vocabulary.values(), location=location)
    token = next(token for token, token_number in vocabulary.items() if token_number == number)
    piece, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [piece, text],
        "pair": [piece, text, *second],
        "special_tokens": tokens,
    }


def token_id(metadata: Mapping[str, Any], key: str, ids: Container[int], *, location: str) -> int:
    """Return the value of a key that names a token. Raises InvalidFileError where it names none."""
    value = metadata.get(key)
    if type(value) is not int or value not in ids:
        raise InvalidFileError(f"{location} has {PREFIX}{key} {str(value)[:40]}, which is no token")
    return value


def vocabulary_and_types(
    metadata: Mapping[str, Any], location: str, vocab_size: int | None
) -> tuple[dict[str, int], list[int]]:
    """Return token to id, without unused ids, and the token type of each id."""
    tokens = typed_list(metadata, "tokens", str, location=location)
    if vocab_size is not None and len(tokens) > vocab_size:
        raise InvalidFileError(
            f"{location} has {len(tokens):,} tokens for a model of {vocab_size:,}, so they are not its own"
        )
    kinds = typed_list(metadata, "token_type", int, location=location) or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or not set(kinds) <= {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        raise InvalidFileError(
            f"{location} has token types that do not fit its {len(tokens):,} tokens, or are not read here"
        )
    if (added := sum(kind != NORMAL for kind in kinds) - kinds.count(UNUSED)) > MAX_ADDED_TOKENS:
        raise InvalidFileError(f"{location} has {added:,} special or added tokens, more than any real one")
    vocabulary = {token: number for number, token in enumerate(tokens) if kinds[number] != UNUSED}
    if len(vocabulary) != len(tokens) - kinds.count(UNUSED):
        raise InvalidFileError(f"{location} has a token twice")
    return vocabulary, kinds


def settings_of(
    metadata: Mapping[str, Any], template: Any, vocabulary: Mapping[str, int], *, location: str
) -> dict[str, Any]:
    """Return the settings that a tokenizer_config.json would have."""
    names = {number: token for token, number in vocabulary.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for token, key in TOKEN_ID_KEYS.items():
        if key in metadata:
            settings[token] = names[token_id(metadata, key, names, location=location)]
    if template is None:
        return settings
    if not isinstance(template, str) or len(template) > MAX_FILE_BYTES["chat_template.jinja"]:
        raise InvalidFileError(f"{location} has a {TEMPLATE} that is no text, or longer than any real one")
    return settings | {"chat_template": template}


def typed_list(metadata: Mapping[str, Any], key: str, kind: type, *, location: str) -> list[Any]:
    """Return a list whose entries all have one type; empty where the key is missing."""
    values = metadata.get(key, [])
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise InvalidFileError(f"{location} has {PREFIX}{key} that is no list of {kind.__name__}")
    return values


def added_token(content: str, number: int, kind: int) -> dict[str, Any]:
    """Return an added token as tokenizer.json has it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": kind == CONTROL}
