"""`smolforge generate`, and what `chat` shares with it: sampling flags, loading a model, printing text safely."""

import json
import os
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smolforge.cli.flags import LoadingFlags, Model
from smolforge.config import Generation
from smolforge.config.base import validate_settings
from smolforge.errors import ConfigError, InvalidFileError

if TYPE_CHECKING:
    from smolforge.models.decoder import LanguageModel

GENERATION_DEFAULTS = Generation()
BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the text direction around them, and so what a line seems to say."""


@Parameter(name="*")
@dataclass(frozen=True)
class GenerationFlags:
    """Flags for the settings of `Generation`."""

    max_new_tokens: int = GENERATION_DEFAULTS.max_new_tokens
    """Longest answer, in tokens."""
    temperature: float = GENERATION_DEFAULTS.temperature
    """0 takes the likeliest token; 1 samples as the model believes."""
    top_k: int | None = GENERATION_DEFAULTS.top_k
    """Sample among this many likeliest tokens."""
    top_p: float | None = GENERATION_DEFAULTS.top_p
    """Sample among the likeliest tokens that together hold this much probability."""
    min_p: float | None = GENERATION_DEFAULTS.min_p
    """Sample among tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = GENERATION_DEFAULTS.repetition_penalty
    """Above 1, tokens already seen become less likely."""
    stop: Annotated[list[str] | None, Parameter(negative="")] = None
    """A string that ends the text and is no part of it; may be given several times."""
    seed: int | None = GENERATION_DEFAULTS.seed
    """Makes the text repeatable."""


def generate(
    model: Model,
    *,
    prompt: str | None = None,
    draw: GenerationFlags | None = None,
    loading: LoadingFlags | None = None,
    json_: bool = False,
) -> None:
    """Continue a text, streaming.

    Without a prompt it is a chat on a terminal, as `smolforge chat` is.

        smolforge generate runs/mine --prompt "Once upon a time" --max-new-tokens 100

    Parameters
    ----------
    prompt
        The text to continue; special tokens in it (<|im_end|>) are not parsed but read as plain text. Without
        one, standard input is read, or, on a terminal, a chat begins.
    json_
        Print text, token_ids, finish_reason and tokens_per_second as one JSON object.
    """
    options, is_chat = generation_from_flags(draw), prompt is None and sys.stdin.isatty()
    if is_chat and json_:
        raise ConfigError("--json prints one answer, not a chat; give it a --prompt")
    language_model = (loading or LoadingFlags()).load(model)
    if is_chat:
        from smolforge.cli.chat import converse

        converse(language_model, options)
    else:
        _print_continuation(language_model, _read_stdin() if prompt is None else prompt, options, json_=json_)


def _print_continuation(model: "LanguageModel", text: str, options: Generation, *, json_: bool) -> None:
    """Print a text and its continuation as it comes, or the result as JSON."""
    from smolforge.generation.stream import join_chunks, require_tokenizer, stream

    note_lost_bytes(require_tokenizer(model).lost_bytes(text))
    start, chunks = time.perf_counter(), []

    def show(part: str) -> None:
        if not json_:
            print(escape_controls(part) if sys.stdout.isatty() else part, end="", flush=True)

    show(text)
    for chunk in stream(model, text, **options.model_dump()):
        chunks.append(chunk)
        show(chunk.text)
    completion = join_chunks(chunks)
    if json_:
        rate = len(completion.token_ids) / (time.perf_counter() - start)
        print(json.dumps({**completion.__dict__, "tokens_per_second": rate}))
    else:
        print()
    if completion.finish_reason == "length" and len(completion.token_ids) < options.max_new_tokens:
        print_note(f"(stopped at the end of the model's context, {model.config.max_position_embeddings:,} tokens)")


def _read_stdin() -> str:
    """Return all of standard input."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")  # Windows' shells may write a mark
    except UnicodeDecodeError as error:
        raise InvalidFileError(f"standard input is not UTF-8 text: {error}") from None


def generation_from_flags(flags: GenerationFlags | None) -> Generation:
    """Return the generation settings of the flags. Raises ConfigError."""
    values = asdict(flags or GenerationFlags())
    return validate_settings(Generation, values | {"stop": tuple(values["stop"] or ())})


def escape_controls(text: str) -> str:
    """Escape control characters, which would move or color the terminal's text."""
    return "".join(
        character if _is_printable(character) else character.encode("unicode_escape").decode() for character in text
    )


def _is_printable(character: str) -> bool:
    return character in "\n\t" or (unicodedata.category(character) != "Cc" and character not in BIDI_CONTROLS)


def print_note(text: str) -> None:
    """Print a note to standard error, dim on a terminal."""
    use_color = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(f"\x1b[2m{text}\x1b[0m" if use_color else text, file=sys.stderr, flush=True)


def note_lost_bytes(lost_bytes: bytes) -> None:
    """Print which bytes the tokenizer cannot encode, if any."""
    if lost_bytes:
        print_note(f"(bytes without a symbol in this tokenizer are left out: {lost_bytes.hex(' ')})")
