"""What a verification found, for people and for scripts."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One promise, and whether it holds."""

    name: str
    holds: bool
    said: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """All checks of one model."""

    model: str
    checks: list[Check] = field(default_factory=list)
    release: str | None = None
    cause: str | None = None
    """The likeliest cause, where something does not hold."""

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The whole report as plain values; the figures scripts ask for most stand at the top."""
        figures = {check.name: check.figures for check in self.checks}
        return {
            "model": self.model,
            "holds": self.holds,
            "cause": self.cause,
            "release": self.release,
            "parameters": figures.get("parameters", {}),
            "max_abs_logit_diff": figures.get("logits float32", {}).get("max_abs_diff"),
            "greedy_match": figures.get("greedy", {}).get("match"),
            "checks": [check.__dict__ for check in self.checks],
        }
