"""A tokenizer as llama.cpp has it, in the values of a .gguf: every token by its id, the merges, and a name.

The name stands for code of llama.cpp that cuts text into words (llama-vocab.cpp: tokenizer_pre), so only tokenizers
that cut as one of those does can be said. Keys and kinds of token as conversion/base.py of llama.cpp writes them.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from smolforge.errors import InvalidFile, SettingError
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.files import LARGEST_FILES

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
CUTS = {"smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]}, "gpt-2": _BYTES}
"""llama.cpp's name to the tokenizers library's steps, for what is written and read here."""
DECODER = _BYTES | {"add_prefix_space": True}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of token: learned, special, added as ordinary text, and none at all."""
PLAIN = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # so spelled in every file
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
MOST_ADDED = 1 << 14
"""Special and added tokens together; each costs time in every text."""
PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"


def to_values(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What a .gguf says of a tokenizer whose model has so many ids. Raises SettingError for one llama.cpp has not."""
    pipeline = json.loads(tokenizer.backend.to_str())
    tokens, kinds = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[number], kinds[number] = token, NORMAL
    for number, token in tokenizer.backend.get_added_tokens_decoder().items():
        kinds[number] = CONTROL if token.special else USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in pipeline["model"].get("merges", [])]
    named = ((key, tokenizer.named(token)) for token, key in IDS.items())
    ids = {PREFIX + key: tokenizer.backend.token_to_id(token) for key, token in named if token is not None}
    return {
        PREFIX + "model": "gpt2",
        PREFIX + "pre": cut_of(pipeline),
        PREFIX + "tokens": tokens,
        PREFIX + "token_type": kinds,
        PREFIX + "merges": merges,
        **{key: number for key, number in ids.items() if number is not None},
        PREFIX + "add_bos_token": False,
        PREFIX + "add_space_prefix": False,
        **({TEMPLATE: tokenizer.template.source} if tokenizer.template else {}),
    }


def cut_of(pipeline: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text. Raises SettingError where it has none."""
    said = pipeline["model"] | {"normalizer": pipeline["normalizer"]}
    other = [key for key, value in (PLAIN | {"normalizer": None}).items() if (said.get(key) or None) != (value or None)]
    steps = json.loads(json.dumps(pipeline["pre_tokenizer"]).replace('"trim_offsets": false', '"trim_offsets": true'))
    found = next((name for name, known in CUTS.items() if known == steps), None)
    if found is None or other:
        what = f"its {other[0]} is not GPT-2's" if other else f"it cuts text as none of {', '.join(CUTS)} does"
        raise SettingError(
            f"llama.cpp has no name for this tokenizer: {what}. It would read text otherwise without a word; "
            "--to transformers hands the model on with its own"
        )
    return found


def from_values(values: Mapping[str, Any], where: str, vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer of a .gguf whose model has so many ids, None where there is none.

    Raises InvalidFile where it is broken or of another kind.
    """
    given = {key.removeprefix(PREFIX): value for key, value in values.items() if key.startswith(PREFIX)}
    if "model" not in given:
        return None
    kind, cut = str(given["model"]), str(given.get("pre"))
    if kind != "gpt2" or cut not in CUTS:
        raise InvalidFile(
            f"{where} has a tokenizer of llama.cpp's kind {kind[:40]!r}, {cut[:40]!r}, which is not read; gpt2 with "
            f"{' or '.join(CUTS)} is. The folder it was converted from has the same as tokenizer.json"
        )
    vocabulary, kinds = tokens_of(given, where, vocab_size)
    merges = listed(given, "merges", str, where)
    added = [described(token, number, kinds[number]) for token, number in vocabulary.items() if kinds[number] != NORMAL]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": CUTS[cut],
        "post_processor": None,
        "decoder": DECODER,
        "model": PLAIN | {"vocab": vocabulary, "merges": merges},
    }
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except BaseException as error:  # the library raises bare Exception, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidFile(f"{where} has a tokenizer that is broken: {str(error)[:200]}") from None
    return Tokenizer(backend, settings_of(given, values.get(TEMPLATE), vocabulary, where))


def tokens_of(given: Mapping[str, Any], where: str, vocab_size: int | None) -> tuple[dict[str, int], list[int]]:
    """Token to id, and the kind of each id; without those that are none."""
    tokens = listed(given, "tokens", str, where)
    if vocab_size is not None and len(tokens) > vocab_size:
        raise InvalidFile(f"{where} has {len(tokens):,} tokens for a model of {vocab_size:,}, so they are not its own")
    kinds = listed(given, "token_type", int, where) or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or not set(kinds) <= {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        raise InvalidFile(f"{where} has token types that do not fit its {len(tokens):,} tokens, or are not read here")
    if (added := sum(kind != NORMAL for kind in kinds) - kinds.count(UNUSED)) > MOST_ADDED:
        raise InvalidFile(f"{where} has {added:,} special or added tokens, more than any real one")
    vocabulary = {token: number for number, token in enumerate(tokens) if kinds[number] != UNUSED}
    if len(vocabulary) != len(tokens) - kinds.count(UNUSED):
        raise InvalidFile(f"{where} has a token twice")
    return vocabulary, kinds


def settings_of(given: Mapping[str, Any], template: Any, vocabulary: Mapping[str, int], where: str) -> dict[str, Any]:
    """What a tokenizer_config.json would say."""
    names = {number: token for token, number in vocabulary.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for token, key in IDS.items():
        if key in given:
            if not isinstance(given[key], int) or given[key] not in names:
                raise InvalidFile(f"{where} has {PREFIX}{key} {str(given[key])[:40]}, which is no token")
            settings[token] = names[given[key]]
    if template is None:
        return settings
    if not isinstance(template, str) or len(template) > LARGEST_FILES["chat_template.jinja"]:
        raise InvalidFile(f"{where} has a {TEMPLATE} that is no text, or longer than any real one")
    return settings | {"chat_template": template}


def listed(given: Mapping[str, Any], key: str, kind: type, where: str) -> list[Any]:
    """A list of one kind of entry, empty where there is none."""
    found = given.get(key, [])
    if not isinstance(found, list) or not all(type(each) is kind for each in found):
        raise InvalidFile(f"{where} has {PREFIX}{key} that is no list of {kind.__name__}")
    return found


def described(content: str, number: int, kind: int) -> dict[str, Any]:
    """An added token as tokenizer.json has it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": kind == CONTROL}
