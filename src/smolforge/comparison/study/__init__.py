"""An idea against another, with evidence: variants x seeds at an equal budget -> paired differences, a report.

STUDY.toml -> read -> plan (steps, kept) -> trials (ordinary runs) -> machine -> findings -> report.md, index.html,
                                            rates first, on seeds of           (law)     study.json
                                            their own; then scores

Each part of it finds what is done and goes on, so the same command again goes on where a study was stopped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolforge.comparison.study import benchmarks
from smolforge.comparison.study.plan import planned
from smolforge.comparison.study.results import Findings, findings
from smolforge.comparison.study.runner import Audience, Exam, Outcome, Trial, Trials, best
from smolforge.comparison.study.spec import Study


def conduct(
    study: Study, out: Path, audience: Audience, seen: Mapping[str, Any] | None = None, measuring: bool = True
) -> Findings:
    """Run what is not run yet, and put numbers to it.

    Raises SettingError or InvalidFile before the first run for what is wrong, Stopped when a signal ended it with
    everything saved. A run that fails or diverges is among the findings. `seen` is what each
    run's environment.json should say of the surroundings; `measuring` is whether decoding and memory are measured
    at the end, where they are not known yet.
    """
    exam = Exam(study.settings.tasks, study.path.parent, out)
    exam.prepare([Trial(name, seed).name for seed in study.settings.seeds for name in study.recipes])
    trials = Trials(study, planned(study, out), out, audience, seen or {}, exam)
    tried = trials.choosing()
    judged = trials.judged({name: best(tried[name]) for name in study.recipes})
    return findings(study, trials.plan, tried, judged, measured(trials, judged, measuring))


def measured(trials: Trials, judged: Mapping[str, Sequence[Outcome]], measuring: bool) -> benchmarks.Measured:
    """Decoding and memory of the variants that have a finished run."""
    done = {name: next((each for each in those if each.value is not None), None) for name, those in judged.items()}
    whole = {name: (each.trial, each.history) for name, each in done.items() if each and each.history}
    plan, recipe, out = trials.plan, trials.study.recipe, trials.out

    def decoding() -> dict[str, list[float]]:
        trials.audience.measuring("decoding")
        return benchmarks.decoding({name: (run.path, run.recipe.train.device) for name, (_, run) in whole.items()})

    def memory() -> dict[str, int | None]:
        trials.audience.measuring("the memory of training")
        changes = {name: trials.overrides(trial) for name, (trial, _) in whole.items()}
        beside = trials.study.path.resolve().parent
        return {name: benchmarks.peak_memory(recipe, each, plan.steps[name], beside) for name, each in changes.items()}

    return benchmarks.Measured(
        benchmarks.kept(out / benchmarks.DECODING, whole, decoding if measuring else None),
        benchmarks.kept(out / benchmarks.MEMORY, whole, memory if measuring else None),
    )
