"""Which optimizer is the quickest to a held-out loss: AdamW or Muon, each with and without an average of its weights.

    python benchmarks/optimizers.py [--data FILE ...] [--recipe nano] [--steps 160] [--batch-tokens 1024] [--seeds 5]
                                    [--out optimizers.json] [--time-only [--rounds 20]] [--quick]

    sweep    each optimizer at rates a factor of two apart, on two other seeds, until the best is not at an end
    study    seeds 0, 1, ...: each candidate at its own best rate, in runs of the recipe's schedule
    target   the highest loss that any of these runs ends with, averages included, so that all reach it; what counts
             is the first step there
    time     milliseconds of a step, the candidates in turns in one process, on one thread, in the process's own time

Seconds to the target are steps times milliseconds. Steps are the same on a busy machine; only the time wants a quiet
one, and `--time-only` measures it alone. An average changes nothing in the run it is of, so one run serves all of an
optimizer's candidates. Runs that are in --out already are not repeated.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from smolforge.config import Recipe
from smolforge.config.base import replace_settings
from smolforge.config.load import read_recipe
from smolforge.data.batches import Batch, TokenWindows, iterate_batches
from smolforge.data.corpus import TRAIN, Corpus
from smolforge.data.prepare.build import prepare
from smolforge.evaluation import measure_corpus
from smolforge.models.decoder import build
from smolforge.runs.resolve import with_resolved_schedule
from smolforge.training.loop import Callback, Hooks, TrainState, forward_backward, train
from smolforge.training.objective import Objective
from smolforge.training.optim import EMA, build_optimizers, ema_weights
from smolforge.training.step_timer import HostClock, StepCost, StepTimer

RATES = {"adamw": (2e-3, 4e-3, 8e-3, 1.6e-2), "muon": (1e-2, 2e-2, 4e-2)}
"""Muon's are its matrices'; the rest has AdamW in the recipe's proportion to them."""
DECAYS = (0.8, 0.95)
SWEEP_SEEDS = (100, 101)
QUICK = {
    "model.vocab_size": 512,
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "model.num_hidden_layers": 1,
    "model.head_dim": 16,
    "train.sequence_length": 32,
}

Curve = list[dict[str, float]]
"""Held-out losses of a run by step: of its weights, and of each average by its decay."""


class Candidate(NamedTuple):
    """An optimizer, and which of a run's weights count."""

    optimizer: str
    weights: tuple[str, ...]

    @property
    def is_averaged(self) -> bool:
        return self.weights != WEIGHTS

    def __str__(self) -> str:
        return {"adamw": "AdamW", "muon": "Muon"}[self.optimizer] + ", average" * self.is_averaged


WEIGHTS, AVERAGES = ("weights",), tuple(f"{decay:g}" for decay in DECAYS)
CANDIDATES = [Candidate(optimizer, weights) for optimizer in RATES for weights in (WEIGHTS, AVERAGES)]
PLAIN = CANDIDATES[0]


class Finding(NamedTuple):
    """What the study says of a candidate: at its best rate and decay, for each seed."""

    rate: float
    weights: str
    steps: list[float]
    """To the target."""
    plateau: list[float]
    """Losses where the rate begins to fall."""
    end: list[float]


class Study:
    """The runs of one recipe on one text, kept in a file."""

    def __init__(self, asked: argparse.Namespace, folder: Path) -> None:
        train = {"train.batch_tokens": asked.batch_tokens, "train.steps": asked.steps}
        changes = train | {"train.micro_batch_size": None, "train.dtype": "float32", "train.compile": False}
        if asked.data:
            changes["data.sources"] = asked.data
        self.recipe = replace_settings(read_recipe(asked.recipe), changes | (QUICK if asked.quick else {}))
        self.every, self.tokens, self.seeds = asked.every, asked.held_out_tokens, asked.seeds
        self.text = prepare(self.recipe.data, folder / "corpus", None, vocab_size=self.recipe.model.vocab_size)
        self.path = asked.out
        told = {"recipe": self.recipe.model_dump(mode="json"), "corpus": self.text.fingerprint, "every": self.every}
        self.kept = json.loads(self.path.read_text()) if self.path.is_file() else {"study": told, "runs": {}}
        if self.kept["study"] != told:
            raise SystemExit(f"{self.path} is of another study; give --out another name")

    def at(self, optimizer: str, rate: float) -> Recipe:
        """The recipe with this optimizer at this rate; all rates, where they end too, stay in its proportions."""
        given = self.recipe.optim
        factor = rate / (given.learning_rate if optimizer == "adamw" else given.matrix_learning_rate)
        changes = {
            "optim.name": optimizer,
            "optim.learning_rate": given.learning_rate * factor,
            "optim.matrix_learning_rate": given.matrix_learning_rate * factor,
            "optim.schedule.final_learning_rate": given.schedule.final_learning_rate * factor,
        }
        return with_resolved_schedule(replace_settings(self.recipe, changes), self.recipe.train.steps)

    def curve(self, optimizer: str, rate: float, seed: int) -> Curve:
        """A run's held-out losses; a run that was made before is not made again."""
        key, runs = f"{optimizer} {rate:g} seed {seed}", self.kept["runs"]
        if key not in runs:
            begun = time.process_time()
            runs[key] = run(self.at(optimizer, rate), self.text, seed, self.every, self.tokens)
            self.save()
            ended = ", ".join(f"{name} {value:.3f}" for name, value in runs[key][-1].items() if name != "step")
            print(f"{key}: {ended} ({time.process_time() - begun:.0f} s)", flush=True)
        return runs[key]

    def save(self) -> None:
        self.path.write_text(json.dumps(self.kept, indent=1) + "\n")


def run(recipe: Recipe, text: Corpus, seed: int, every: int, tokens: int) -> Curve:
    """Train from scratch, measuring now and then."""
    model, found = build(recipe.model, seed), []
    model.tokenizer = text.tokenizer()
    averages = {name: EMA(model.parameters(), decay) for name, decay in zip(AVERAGES, DECAYS, strict=True)}

    def loss() -> float:
        return measure_corpus(model, text, recipe.train.sequence_length, max_tokens=tokens)["loss"]

    def measure(now: TrainState, metrics: dict[str, Any]) -> None:
        found.append({"step": now.step, "weights": loss()})
        for name, average in averages.items():
            with ema_weights([average]):
                found[-1][name] = loss()

    windows = TokenWindows(text.tokens(TRAIN), recipe.train.sequence_length, seed)
    train(
        Objective.from_recipe(model, recipe),
        [*build_optimizers(model, recipe.optim), *averages.values()],
        iterate_batches(windows, count(), recipe.train.sequences_per_step, num_workers=0),
        recipe=recipe,
        state=TrainState(),
        timer=StepTimer(StepCost(1, 1, 1, 1.0), recipe.train.steps, HostClock()),
        hooks=Hooks([Callback(every, measure)]),
    )
    return found


def best_rate(loss_at: Callable[[float], float], rates: Iterable[float]) -> float:
    """The rate of the lowest loss; where it is the first or the last, those beyond are tried too."""
    found = {rate: loss_at(rate) for rate in rates}
    while True:
        best = min(found, key=lambda rate: found[rate])
        if min(found) < best < max(found):
            return best
        beyond = best * 2 if best == max(found) else best / 2
        found[beyond] = loss_at(beyond)


def final(curve: Curve, name: str) -> float:
    loss = curve[-1][name]
    return loss if math.isfinite(loss) else math.inf


def steps_to(target: float, curve: Curve, name: str) -> float:
    """The step at which a loss first is no more than the target, on straight lines between measurements."""
    for before, after in pairwise(curve):
        if after[name] <= target:
            share = (before[name] - target) / (before[name] - after[name])
            return before["step"] + max(0.0, share) * (after["step"] - before["step"])
    return math.inf


def chosen(study: Study, candidate: Candidate) -> tuple[float, str]:
    """A candidate's best rate, and which of its weights, by the mean loss at the end of the sweep's runs."""

    def best(rate: float) -> tuple[float, str]:
        curves = [study.curve(candidate.optimizer, rate, seed) for seed in SWEEP_SEEDS]
        return min((statistics.mean(final(curve, name) for curve in curves), name) for name in candidate.weights)

    rate = best_rate(lambda rate: best(rate)[0], RATES[candidate.optimizer])
    return rate, best(rate)[1]


def findings(study: Study) -> tuple[float, dict[Candidate, Finding]]:
    """The target, and what each candidate needs to reach it."""
    picked = {candidate: chosen(study, candidate) for candidate in CANDIDATES}
    curves = {
        candidate: [study.curve(candidate.optimizer, rate, seed) for seed in range(study.seeds)]
        for candidate, (rate, _) in picked.items()
    }
    ended = (final(curve, name) for each in CANDIDATES for curve in curves[each] for name in (*WEIGHTS, *AVERAGES))
    target = max(ended)
    return target, {each: finding_of(study, curves[each], *picked[each], target) for each in CANDIDATES}


def finding_of(study: Study, curves: list[Curve], rate: float, name: str, target: float) -> Finding:
    """What runs come to, by some of their weights."""
    schedule = with_resolved_schedule(study.recipe, study.recipe.train.steps).optim.schedule
    fall = (schedule.steps or 0) - (schedule.decay_steps or 0)
    return Finding(
        rate,
        name,
        [steps_to(target, curve, name) for curve in curves],
        [next(point[name] for point in reversed(curve) if point["step"] <= fall) for curve in curves],
        [final(curve, name) for curve in curves],
    )


def milliseconds(study: Study, rounds: int) -> dict[str, list[float]]:
    """A step of every candidate in each round, in the process's own time on one thread."""
    rows, length = study.recipe.train.sequences_per_step, study.recipe.train.sequence_length
    ids = torch.randint(study.recipe.model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[float]] = {str(candidate): [] for candidate in CANDIDATES}
    racers = {}
    for candidate in CANDIDATES:
        recipe = study.at(candidate.optimizer, RATES[candidate.optimizer][0])
        recipe = replace_settings(recipe, {"optim.ema_decay": DECAYS[0] if candidate.is_averaged else None})
        model = build(recipe.model)
        racers[str(candidate)] = Objective(model), build_optimizers(model, recipe.optim)
    for turn in range(rounds + 1):
        for name, (objective, stepped) in racers.items():
            begun = time.process_time()
            forward_backward(objective, Batch(ids, ids.roll(-1, 1)), ids.numel(), rows=rows)
            nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            for each in stepped:
                each.step()
            objective.zero_grad(set_to_none=True)
            if turn:  # the first allocates
                taken[name].append(1000 * (time.process_time() - begun))
    return taken


def spread(values: list[float], digits: int = 0) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(study: Study, target: float, found: dict[Candidate, Finding]) -> None:
    train, schedule = study.recipe.train, study.recipe.optim.schedule
    print(
        f"\n{train.steps} steps of {train.batch_tokens} tokens, {study.seeds} seeds, target {target:.3f}: {schedule}\n"
    )
    print(
        "| candidate | rate | steps to the target | of AdamW's, by seed (range) | ms a step | seconds "
        "| loss before the fall | at the end |\n|---|---|---|---|---|---|---|---|"
    )
    for candidate, finding in found.items():
        shares = [mine / plain for mine, plain in zip(finding.steps, found[PLAIN].steps, strict=True)]
        cost = statistics.median(study.kept["milliseconds"][str(candidate)])
        cells = [
            f"{candidate} ({finding.weights})" if candidate.is_averaged else str(candidate),
            f"{finding.rate:g}",
            spread(finding.steps),
            median_and_range(shares),
            f"{cost:.0f}",
            spread([steps * cost / 1000 for steps in finding.steps], 1),
            spread(finding.plateau, 3),
            spread(finding.end, 3),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def report_averages(study: Study, target: float, found: dict[Candidate, Finding]) -> None:
    """What averages are worth in the very runs they are of: in them, all else is equal."""
    print("\n| runs | average | steps, of the weights' own (range) | loss less theirs before the fall | at the end |")
    print("|---|---|---|---|---|")
    for optimizer, rate in sorted({(candidate.optimizer, finding.rate) for candidate, finding in found.items()}):
        curves = [study.curve(optimizer, rate, seed) for seed in range(study.seeds)]
        plain = finding_of(study, curves, rate, "weights", target)
        for name in AVERAGES:
            mine = finding_of(study, curves, rate, name, target)
            cells = [
                f"{Candidate(optimizer, WEIGHTS)} at {rate:g}",
                name,
                median_and_range([own / other for own, other in zip(mine.steps, plain.steps, strict=True)]),
                spread([own - other for own, other in zip(mine.plateau, plain.plateau, strict=True)], 3),
                spread([own - other for own, other in zip(mine.end, plain.end, strict=True)], 3),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def report_time(taken: dict[str, list[float]]) -> None:
    print("\n| candidate | ms a step | of AdamW's in the same round (range) |\n|---|---|---|")
    for name, mine in taken.items():
        shares = [own / plain for own, plain in zip(mine, taken[str(PLAIN)], strict=True)]
        print(f"| {name} | {statistics.median(mine):.1f} | {median_and_range(shares)} |", flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="text files; by default the recipe's")
    parser.add_argument("--recipe", default="nano")
    for name, value in {"steps": 160, "batch-tokens": 1024, "seeds": 5, "every": 10, "rounds": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--held-out-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("optimizers.json"))
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    asked = parser.parse_args(words)
    if asked.quick:
        vars(asked).update(steps=4, batch_tokens=32, seeds=2, every=2, held_out_tokens=64, rounds=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(asked, Path(folder))
        done = None if asked.time_only else findings(study)
        if asked.time_only or "milliseconds" not in study.kept:
            study.kept["milliseconds"] = milliseconds(study, asked.rounds)
        if done is not None:
            study.kept["target"], found = done
            study.kept["found"] = {str(candidate): finding._asdict() for candidate, finding in found.items()}
            report(study, *done)
            report_averages(study, *done)
        study.save()
    report_time(study.kept["milliseconds"])


if __name__ == "__main__":
    main()
