"""The result of a verification, for users and for scripts."""

import math
from dataclasses import dataclass, field
from typing import Any


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
        return _json_has_no_nan(
            {
                "model": self.model,
                "holds": self.holds,
                "cause": self.cause,
                "release": self.release,
                "parameters": figures.get("parameters", {}),
                "max_abs_logit_diff": figures.get("logits float32", {}).get("max_abs_diff"),
                "greedy_match": figures.get("greedy", {}).get("match"),
                "checks": [
                    {"name": check.name, "holds": check.holds, "message": check.message, "figures": check.figures}
                    for check in self.checks
                ],
            }
        )


def _json_has_no_nan(value: Any) -> Any:
    """Return the same value with None for every NaN or infinity."""
    if isinstance(value, dict):
        return {key: _json_has_no_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_json_has_no_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
