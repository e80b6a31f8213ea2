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
from smolforge.comparison.study.plan import load_or_make_plan
from smolforge.comparison.study.results import StudyResults, compute_results
from smolforge.comparison.study.runner import Outcome, StudyListener, TaskEvaluator, Trial, Trials, best_factor
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
    evaluator = TaskEvaluator(study.settings.tasks, study.path.parent, out)
    evaluator.prepare([Trial(name, seed).name for seed in study.settings.seeds for name in study.recipes])
    trials = Trials(study, load_or_make_plan(study, out), out, listener, environment or {}, evaluator)
    rate_outcomes = trials.search_learning_rates()
    outcomes = trials.run_all({name: best_factor(rate_outcomes[name]) for name in study.recipes})
    return compute_results(
        study,
        trials.plan,
        rate_outcomes,
        outcomes_by_variant=outcomes,
        measurements=measure_variants(trials, outcomes, measure_costs),
    )


def measure_variants(
    trials: Trials, outcomes_by_variant: Mapping[str, Sequence[Outcome]], measure_costs: bool
) -> benchmarks.VariantMeasurements:
    """Decoding and memory of the variants that have a finished run."""
    finished = {
        name: next((outcome for outcome in outcomes if outcome.value is not None), None)
        for name, outcomes in outcomes_by_variant.items()
    }
    measurable = {
        name: (outcome.trial, outcome.history) for name, outcome in finished.items() if outcome and outcome.history
    }
    plan, recipe, out = trials.plan, trials.study.recipe, trials.out

    def decoding() -> dict[str, list[float]]:
        trials.listener.on_measure_start("decoding")
        return benchmarks.decoding_speeds(
            {name: (run.path, run.recipe.train.device) for name, (_, run) in measurable.items()}
        )

    def memory() -> dict[str, int | None]:
        trials.listener.on_measure_start("the memory of training")
        overrides_by_variant = {name: trials.overrides(trial) for name, (trial, _) in measurable.items()}
        study_dir = trials.study.path.resolve().parent
        return {
            name: benchmarks.peak_memory(recipe, overrides, plan.steps[name], classes_dir=study_dir)
            for name, overrides in overrides_by_variant.items()
        }

    return benchmarks.VariantMeasurements(
        benchmarks.load_or_measure(out / benchmarks.DECODING, measurable, decoding if measure_costs else None),
        benchmarks.load_or_measure(out / benchmarks.MEMORY, measurable, memory if measure_costs else None),
    )
