"""Compare ideas with evidence: variants x seeds at an equal budget -> paired differences, a report.

STUDY.toml -> read_study -> plan (steps, "auto") -> trials (ordinary runs) -> cost -> StudyResults -> report.md,
                                                    learning rates first,             (law)           index.html,
                                                    on seeds of their own;                            study.json
                                                    then task scores

Each stage skips what is already done, so the same command resumes a study that was stopped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolforge.comparison.study import benchmarks
from smolforge.comparison.study.benchmarks import DECODING, MEMORY, measure_once
from smolforge.comparison.study.plan import load_or_make_plan
from smolforge.comparison.study.results import StudyResults, compute_results
from smolforge.comparison.study.runner import Outcome, StudyListener, Trial, Trials, best_factor
from smolforge.comparison.study.spec import Study


def run_variants(
    study: Study,
    out: Path,
    listener: StudyListener,
    *,
    environment: Mapping[str, Any] | None = None,
    measure_costs: bool = True,
) -> StudyResults:
    """Run what is not run yet, and put numbers to it.

    Raises ConfigError or InvalidFileError before the first run for what is wrong, Stopped when a signal ended it with
    everything saved. A run that fails or diverges is among the findings. `environment` is what each
    run's environment.json should say of the surroundings; `measure_costs` is whether decoding and memory are measured
    at the end, where they are not known yet.
    """
    evaluator = benchmarks.TaskEvaluator(study.settings.tasks, study.path.parent, out)
    evaluator.prepare([Trial(name, seed).name for seed in study.settings.seeds for name in study.recipes])
    trials = Trials(study, load_or_make_plan(study, out), out, listener, environment or {}, evaluator)
    rate_outcomes = trials.search_learning_rates()
    outcomes = trials.run_all({name: best_factor(rate_outcomes[name]) for name in study.recipes})
    return compute_results(
        study,
        trials.plan,
        rate_outcomes,
        outcomes_by_variant=outcomes,
        measured=measure_variants(trials, outcomes, measure_costs),
    )


def measure_variants(
    trials: Trials, outcomes_by_variant: Mapping[str, Sequence[Outcome]], measure_costs: bool
) -> dict[str, dict[str, Any]]:
    """Decoding and memory of the variants that have a finished run; what is known already is not measured again."""
    finished = {
        name: (outcome.trial, run)
        for name, outcomes in outcomes_by_variant.items()
        for outcome in reversed(outcomes)  # of several, the first
        if (run := outcome.finished_run) is not None
    }

    def is_complete(stored: Mapping[str, Any]) -> bool:
        return not measure_costs or finished.keys() <= stored.keys()

    def decoding() -> dict[str, list[float]]:
        trials.listener.on_measure_start("decoding")
        devices = {name: (run.path, run.recipe.train.device) for name, (_, run) in finished.items()}
        return benchmarks.decoding_speeds(devices)

    def memory() -> dict[str, int | None]:
        trials.listener.on_measure_start("the memory of training")
        recipe, steps, folder = trials.study.recipe, trials.plan.steps, trials.study.path.resolve().parent
        overrides = {name: trials.overrides(trial) for name, (trial, _) in finished.items()}
        return {
            name: benchmarks.peak_memory(recipe, changes, steps[name], classes_dir=folder)
            for name, changes in overrides.items()
        }

    files = {"decode_tokens_per_second": (DECODING, decoding), "peak_memory_bytes": (MEMORY, memory)}
    return {name: measure_once(trials.out / file, is_complete, measure) for name, (file, measure) in files.items()}
