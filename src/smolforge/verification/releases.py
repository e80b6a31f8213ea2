"""What is known of the published models: shape, hashes, and what they say.

One TOML a release, in releases/. A model is taken for a release by the Hub id it was asked for under, by the
hash of its weights, or by the name of its folder.
"""

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from smolforge.config import ModelConfig, presets


@dataclass(frozen=True)
class Golden:
    """What a release says after a prompt, greedily, in fp32."""

    prompt_ids: Sequence[int]
    greedy_ids: Sequence[int]
    greedy_text: str = ""
    prompt: str | None = None
    confidence: str = "high"
    """"high" where independent implementations agree; anything less is reported and decides nothing."""
    top_ids: Sequence[int] = ()
    top_logits: Sequence[float] = ()
    """The likeliest first tokens and their logits."""
    abs_tolerance: float = 1e-4
    rel_tolerance: float = 1e-5


@dataclass(frozen=True)
class Release:
    """One published model."""

    id: str
    shape: Mapping[str, Any]
    parameters: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    golden: Sequence[Golden] = ()

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.model_validate(self.shape)

    @property
    def name(self) -> str:
        """The id without its owner."""
        return self.id.rpartition("/")[2]


def published() -> list[Release]:
    """All releases this package knows."""
    files = sorted((resources.files("smolforge.verification") / "releases").iterdir(), key=lambda file: file.name)
    return [parse(tomllib.loads(file.read_text("utf-8"))) for file in files if file.name.endswith(".toml")]


def parse(content: dict[str, Any]) -> Release:
    """A release from its TOML; `preset` stands for the shape."""
    golden = [Golden(**entry) for entry in content.pop("golden", [])]
    return Release(shape=presets.shape(content.pop("preset")), golden=golden, **content)


def identify(model: str, folder: Path, hashes: Mapping[str, str], releases: Sequence[Release]) -> Release | None:
    """The release a MODEL is, or says it is, by its id, its weights or the name of its folder."""
    asked = model.partition("@")[0]
    for known in releases:
        by_name = not Path(model).exists() and asked == known.id and "@" not in model
        by_weights = bool(known.sha256) and set(known.sha256.values()) <= set(hashes.values())
        if by_name or by_weights or folder.resolve().name == known.name:
            return known
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(found: ModelConfig, release: Release) -> dict[str, tuple[Any, Any]]:
    """Settings that are not the published ones: name to (here, published)."""
    published = release.config
    names = dict.fromkeys([*published.own_fields(), *found.own_fields()])
    pairs = {name: (found.__dict__[name], published.__dict__[name]) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
