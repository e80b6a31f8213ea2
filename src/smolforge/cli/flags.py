"""Flags that several commands take, and their checks. It imports no settings, so that --help is fast."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smolforge.errors import ConfigError

if TYPE_CHECKING:
    from smolforge.models.decoder import LanguageModel

Model = Annotated[str, Parameter(help="A Hub id, a model folder, a run folder or one of its checkpoints.")]


@Parameter(name="*")
@dataclass(frozen=True)
class LoadingFlags:
    """Flags for how a MODEL is loaded."""

    dtype: str = "float32"
    """float32, bfloat16, float16 or float64."""
    device: str = "auto"
    """cpu, cuda or mps; auto is cuda where that is present, else cpu: mps must be asked for."""
    random: bool = False
    """Let a preset be used with random weights."""

    def load(self, model: str) -> "LanguageModel":
        """Return a MODEL on the device. Raises InvalidFileError for one that has no tokenizer."""
        from smolforge.checkpoint.loading import load
        from smolforge.device import pick_device
        from smolforge.generation.stream import require_tokenizer

        language_model = load(model, self.dtype, str(pick_device(self.device)), random=self.random)
        require_tokenizer(language_model)
        return language_model


def check_at_least(minimum: int, **flags: int | None) -> None:
    """Raise ConfigError for a flag whose value is too small."""
    for name, value in flags.items():
        if value is not None and value < minimum:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it should be at least {minimum}")


def check_unique(names: Iterable[str]) -> None:
    """Raise ConfigError where two results would have the same name."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigError(f"two of what is measured are called {repeated[0]}; name each once, or rename a file")


def split_names(names: str | None) -> list[str]:
    """Return names that were given with commas between them."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]
