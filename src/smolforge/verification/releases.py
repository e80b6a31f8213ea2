"""References of the published models: shape, hashes, and greedy text.

There is one TOML per release, in releases/. A model is identified as a release by its Hub id, by the hash of its
weights, or by the name of its folder.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from smolforge.config import ModelConfig, presets


@dataclass(frozen=True)
class Golden:
    """The greedy text of a release after a prompt, in fp32."""

    prompt_ids: Sequence[int]
    greedy_ids: Sequence[int]
    greedy_text: str = ""
    prompt: str | None = None
    confidence: str = "high"
    """"high" where independent implementations agree; anything less is reported and decides nothing."""
    top_ids: Sequence[int] = ()
    top_logits: Sequence[float] = ()
    """The most likely first tokens and their logits."""
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


def published_releases() -> list[Release]:
    """Return all releases that the package contains."""
    files = sorted((resources.files("smolforge.verification") / "releases").iterdir(), key=lambda file: file.name)
    return [parse_release(tomllib.loads(file.read_text("utf-8"))) for file in files if file.name.endswith(".toml")]


def parse_release(content: dict[str, Any]) -> Release:
    """Return the release of a parsed TOML; `preset` names the shape."""
    golden = [Golden(**entry) for entry in content.pop("golden", [])]
    return Release(shape=presets.shape(content.pop("preset")), golden=golden, **content)


def identify_release(
    model: str, folder: Path, hashes: Mapping[str, str], *, releases: Sequence[Release]
) -> Release | None:
    """Return the release that a MODEL is, by its id, its weights or the name of its folder."""
    hub_id = model.partition("@")[0]
    for release in releases:
        by_name = not Path(model).exists() and hub_id == release.id and "@" not in model
        by_weights = bool(release.sha256) and set(release.sha256.values()) <= set(hashes.values())
        if by_name or by_weights or folder.resolve().name == release.name:
            return release
    return None


def config_differences(config: ModelConfig, release: Release) -> dict[str, tuple[Any, Any]]:
    """Return settings that are not the published ones: name to (value, published value)."""
    expected = release.config
    names = dict.fromkeys([*expected.family_fields(), *config.family_fields()])
    pairs = {name: (config.__dict__[name], expected.__dict__[name]) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
