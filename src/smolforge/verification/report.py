"""The result of a verification, for users and for scripts."""

from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_jsonable_python


@dataclass(frozen=True)
class Check:
    """One property, and whether it holds."""

    name: str
    holds: bool
    message: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class VerificationReport:
    """All checks of one model."""

    model: str
    checks: list[Check] = field(default_factory=list)
    release: str | None = None
    cause: str | None = None
    """The most likely cause, if something does not hold."""

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values, with the most used figures at the top level."""
        figures = {check.name: check.figures for check in self.checks}
        summary = {
            "model": self.model,
            "holds": self.holds,
            "cause": self.cause,
            "release": self.release,
            "parameters": figures.get("parameters", {}),
            "max_abs_logit_diff": figures.get("logits float32", {}).get("max_abs_diff"),
            "greedy_match": figures.get("greedy", {}).get("match"),
            "checks": self.checks,
        }
        return to_jsonable_python(summary, inf_nan_mode="null")
