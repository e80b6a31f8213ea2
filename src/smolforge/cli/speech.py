"""What generate and chat share: how text is drawn, the model that draws it, and what a terminal may be shown of it."""

import os
import sys
import unicodedata
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smolforge.config import Generation
from smolforge.settings import validated

if TYPE_CHECKING:
    from smolforge.model import LanguageModel

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
    from smolforge.checkpoint.resolve import load
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
