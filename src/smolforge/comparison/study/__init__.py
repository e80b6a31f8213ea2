"""An idea against another, with evidence: variants x seeds at an equal budget -> paired differences, a report.

STUDY.toml -> read -> plan (steps, kept) -> trials (ordinary runs) -> findings -> report.md, index.html, study.json
                                            rates first, on seeds of their own

Each part of it finds what is done and goes on, so the same command again goes on where a study was stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolforge.comparison.study.findings import Findings, findings
from smolforge.comparison.study.plan import planned
from smolforge.comparison.study.read import Study
from smolforge.comparison.study.trials import Audience, Trials, best


def conduct(study: Study, out: Path, audience: Audience, seen: Mapping[str, Any] | None = None) -> Findings:
    """Run what is not run yet, and put numbers to it.

    Raises SettingError or InvalidFile before the first run for what is wrong, Stopped when a signal ended it with
    everything saved. A run that fails or diverges is among the findings. `seen` is what each
    run's environment.json should say of the surroundings.
    """
    trials = Trials(study, planned(study, out), out, audience, seen or {})
    tried = trials.choosing()
    judged = trials.judged({name: best(tried[name]) for name in study.recipes})
    return findings(study, trials.plan, tried, judged)
