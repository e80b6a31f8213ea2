"""`smolforge generate`."""

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smolforge.cli.speech import Draw, drawn, loaded, note, note_lost, visible
from smolforge.config import Generation
from smolforge.errors import InvalidFile, SettingError

if TYPE_CHECKING:
    from smolforge.model import LanguageModel


def generate(
    model: str,
    *,
    prompt: str | None = None,
    draw: Draw | None = None,
    dtype: str = "float32",
    device: str = "auto",
    random: bool = False,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Continue a text, streaming.

    Without a prompt it is a chat on a terminal, as `smolforge chat` is.

        smolforge generate runs/mine --prompt "Once upon a time" --max-new-tokens 100

    Parameters
    ----------
    model
        A Hub id, a model folder, a run folder or one of its checkpoints.
    prompt
        The text to continue; special tokens in it (<|im_end|>) are not parsed but read as plain text. Without
        one, standard input is read, or, on a terminal, a chat begins.
    dtype
        float32, bfloat16, float16 or float64.
    device
        cpu, cuda or mps; auto takes the fastest present.
    random
        Let a preset speak with random weights.
    json_
        Print text, token_ids, finish_reason and tokens_per_second as one JSON object.
    """
    options = drawn(draw)
    if prompt is None and sys.stdin.isatty():
        from smolforge.cli.chat import converse

        if json_:
            raise SettingError("--json prints one answer, not a chat; give it a --prompt")
        converse(loaded(model, dtype, device, random), options)
    else:
        ready = loaded(model, dtype, device, random)
        _continue(ready, _piped() if prompt is None else prompt, options, json_)


def _continue(model: "LanguageModel", text: str, options: Generation, json_: bool) -> None:
    """Print a text and its continuation as it comes, or all that there is to say of it as JSON."""
    from smolforge.generation.stream import join, own, stream

    note_lost(own(model).lost_bytes(text))
    show = visible if sys.stdout.isatty() else str
    begun, pieces = time.perf_counter(), []
    if not json_:
        print(show(text), end="", flush=True)
    for piece in stream(model, text, **options.model_dump()):
        pieces.append(piece)
        if not json_:
            print(show(piece.text), end="", flush=True)
    whole = join(pieces)
    if json_:
        rate = len(whole.token_ids) / (time.perf_counter() - begun)
        print(json.dumps({**whole.__dict__, "tokens_per_second": rate}))
    else:
        print()
    if whole.finish_reason == "length" and len(whole.token_ids) < options.max_new_tokens:
        note(f"(stopped at the end of the model's context, {model.config.max_position_embeddings:,} tokens)")


def _piped() -> str:
    """All of standard input."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFile(f"standard input is not UTF-8 text: {error}") from None
