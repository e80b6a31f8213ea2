"""`smolforge generate`.

What generate and chat share: how text is drawn, the model that draws it, and what a terminal may be shown of it.
"""

import json
import os
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smolforge.config import Generation
from smolforge.config.base import validated
from smolforge.errors import InvalidFile, SettingError

if TYPE_CHECKING:
    from smolforge.models.decoder import LanguageModel

DEFAULTS = Generation()
TURNS_TEXT = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the direction of those around them, and so what a line seems to say."""


@Parameter(name="*")
@dataclass(frozen=True)
class Draw:
    """Flags for the settings of `Generation`."""

    max_new_tokens: int = DEFAULTS.max_new_tokens
    """Longest answer, in tokens."""
    temperature: float = DEFAULTS.temperature
    """0 takes the likeliest token; 1 samples as the model believes."""
    top_k: int | None = DEFAULTS.top_k
    """Sample among this many likeliest tokens."""
    top_p: float | None = DEFAULTS.top_p
    """Sample among the likeliest tokens that together hold this much probability."""
    min_p: float | None = DEFAULTS.min_p
    """Sample among tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = DEFAULTS.repetition_penalty
    """Above 1, tokens already seen become less likely."""
    stop: Annotated[list[str] | None, Parameter(negative="")] = None
    """A string that ends the text and is no part of it; may be given several times."""
    seed: int | None = DEFAULTS.seed
    """Makes the text repeatable."""


def drawn(flags: Draw | None) -> Generation:
    """The settings that flags ask for. Raises SettingError."""
    given = asdict(flags or Draw())
    return validated(Generation, given | {"stop": tuple(given["stop"] or ())})


def loaded(model: str, dtype: str, device: str, random: bool) -> "LanguageModel":
    """A model that can talk: one with a tokenizer."""
    from smolforge.checkpoint.loading import load
    from smolforge.device import pick_device
    from smolforge.generation.stream import own

    found = load(model, dtype, str(pick_device(device)), random)
    own(found)
    return found


def visible(text: str) -> str:
    """Text as a terminal may be given it: of control characters, which would move or colour things, their names."""
    return "".join(each if _harmless(each) else each.encode("unicode_escape").decode() for each in text)


def _harmless(character: str) -> bool:
    return character in "\n\t" or (unicodedata.category(character) != "Cc" and character not in TURNS_TEXT)


def note(text: str) -> None:
    """A word beside the conversation, dim where that can be seen."""
    colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(f"\x1b[2m{text}\x1b[0m" if colours else text, file=sys.stderr, flush=True)


def note_lost(lost: bytes) -> None:
    """Say which bytes a tokenizer cannot read, if any."""
    if lost:
        note(f"(bytes without a symbol in this tokenizer are left out: {lost.hex(' ')})")


if TYPE_CHECKING:
    from smolforge.models.decoder import LanguageModel


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
