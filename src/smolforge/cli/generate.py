"""`smolforge generate`."""

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smolforge.config import Generation
from smolforge.errors import InvalidFile
from smolforge.settings import validated

if TYPE_CHECKING:
    from smolforge.model import LanguageModel

DEFAULTS = Generation()


def generate(
    model: str,
    *,
    prompt: str | None = None,
    max_new_tokens: int = DEFAULTS.max_new_tokens,
    temperature: float = DEFAULTS.temperature,
    top_k: int | None = DEFAULTS.top_k,
    top_p: float | None = DEFAULTS.top_p,
    min_p: float | None = DEFAULTS.min_p,
    repetition_penalty: float = DEFAULTS.repetition_penalty,
    stop: list[str] | None = None,
    seed: int | None = DEFAULTS.seed,
    dtype: str = "float32",
    device: str = "auto",
    random: bool = False,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Continue a text, streaming; or chat, on a terminal, with a model that was taught to.

    Parameters
    ----------
    model
        A Hub id, a model folder, a run folder or one of its checkpoints.
    prompt
        The text to continue; special tokens in it (<|im_end|>) are not parsed but read as plain text. Without
        one, standard input is read, line by line on a terminal, where a model with a chat template answers.
    max_new_tokens
        Longest answer, in tokens.
    temperature
        0 takes the likeliest token; 1 samples as the model believes.
    top_k
        Sample among this many likeliest tokens.
    top_p
        Sample among the likeliest tokens that together hold this much probability.
    min_p
        Sample among tokens at least this many times as likely as the likeliest.
    repetition_penalty
        Above 1, tokens already seen become less likely.
    stop
        A string that ends the text and is no part of it; may be given several times.
    seed
        Makes the text repeatable.
    dtype
        float32, bfloat16, float16 or float64.
    device
        cpu, cuda or mps; auto takes the fastest present.
    random
        Let a preset speak with random weights.
    json_
        Print text, token_ids, finish_reason and tokens_per_second as one JSON object.
    """
    options = validated(
        Generation,
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop": tuple(stop or ()),
            "seed": seed,
        },
    )
    from smolforge.checkpoint.resolve import load
    from smolforge.device import pick_device
    from smolforge.generation.stream import own

    loaded = load(model, dtype, str(pick_device(device)), random)
    own(loaded)
    if prompt is not None:
        _answer(loaded, prompt, options, json_)
    elif not sys.stdin.isatty():
        _answer(loaded, _piped(), options, json_)
    elif loaded.tokenizer.template is None:
        print("Type the beginning of a text; the model goes on. Ctrl-D ends.", file=sys.stderr)
        while line := _line():
            _answer(loaded, line, options, json_)
    else:
        print("Say something; the model answers, and remembers what was said. Ctrl-D ends.", file=sys.stderr)
        said: list[dict[str, str]] = []
        while line := _line():
            said.append({"role": "user", "content": line})
            said.append({"role": "assistant", "content": _answer(loaded, line, options, json_, said)})


def _answer(
    model: "LanguageModel", text: str, options: Generation, json_: bool, said: list[dict[str, str]] | None = None
) -> str:
    """Print the continuation of a text as it comes, or the answer to what was `said`, and return it."""
    from smolforge.generation.stream import join, stream

    if lost := model.tokenizer.lost_bytes(text):
        print(f"(bytes without a symbol in this tokenizer are left out: {lost.hex(' ')})", file=sys.stderr)
    begun, pieces = time.perf_counter(), []
    if not json_ and said is None:
        print(text, end="", flush=True)
    for piece in stream(model, text if said is None else said, **options.model_dump()):
        pieces.append(piece)
        if not json_:
            print(piece.text, end="", flush=True)
    whole = join(pieces)
    if json_:
        rate = len(whole.token_ids) / (time.perf_counter() - begun)
        print(json.dumps({**whole.__dict__, "tokens_per_second": rate}))
    else:
        print()
    if whole.finish_reason == "length" and len(whole.token_ids) < options.max_new_tokens:
        limit = model.config.max_position_embeddings
        print(f"(stopped at the end of the model's context, {limit:,} tokens)", file=sys.stderr)
    return whole.text


def _piped() -> str:
    """All of standard input."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFile(f"standard input is not UTF-8 text: {error}") from None


def _line() -> str:
    """The next line typed that is not empty; nothing at the end of input."""
    try:
        while not (line := input("> ")):
            pass
    except EOFError:
        return ""
    return line
