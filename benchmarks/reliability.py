"""What it costs that nothing is lost: the nano recipe with all of it and without, and one checkpoint of the full shape.

    python benchmarks/reliability.py [--rounds 3] [--steps 100] [--every 25] [--preset smollm2-135m]

Runs come in turn, each in a fresh process, and are timed from the first batch until the last checkpoint is safe.
`with` is how smolforge trains; `without` has no guard, no check of the corpus, and saves only at the end, while
training waits. Beside that, the time inside is summed: what the training thread spends in saving, judging and
writing its metrics, and what the threads beside it use of a processor.
"""

import argparse
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WITH, WITHOUT = "with", "without"


def timed(owner: Any, name: str, spent: Counter[str], label: str, clock: Callable[[], float]) -> None:
    """Count the seconds that a method takes, the outermost call only."""
    real, inside = getattr(owner, name), []

    def method(*arguments: Any, **named: Any) -> Any:
        inside.append(name)
        start = clock()
        try:
            return real(*arguments, **named)
        finally:
            inside.pop()
            if not inside:
                spent[label] += clock() - start

    setattr(owner, name, method)


def run_nano(kind: str, folder: Path, steps: int, every: int, answer: Connection) -> None:
    """Train; send (seconds, seconds by part)."""
    from smolforge.data.corpus import Corpus
    from smolforge.runs import callbacks, run, train
    from smolforge.runs.async_checkpoint import AsyncCheckpointer
    from smolforge.training import guard, run_folder

    spent: Counter[str] = Counter()
    timed(run, "train", spent, "training", time.perf_counter)
    timed(callbacks.TrainingCallbacks, "finish", spent, "last checkpoint", time.perf_counter)
    timed(callbacks.TrainingCallbacks, "save", spent, "copying", time.perf_counter)
    timed(callbacks.TrainingCallbacks, "should_stop", spent, "looking", time.perf_counter)
    timed(guard.LossGuard, "__call__", spent, "judging", time.perf_counter)
    timed(run_folder.RunFolder, "append", spent, "metrics", time.perf_counter)
    timed(AsyncCheckpointer, "_write", spent, "writing, beside", time.thread_time)
    timed(Corpus, "check", spent, "corpus check, beside", time.thread_time)
    given: dict[str, Any] = {
        "train.evaluate_every": "none",
        "train.sample_every": "none",
        "optim.schedule.steps": 1000,
        "train.checkpoint_every": every,
        "report.to": "none",
    }
    if kind == WITHOUT:
        Corpus.check = lambda _: None
        given |= {"guard.enabled": False, "train.checkpoint_every": "none", "train.checkpoint_in_background": False}
    train("nano", folder, steps=steps, **given)
    answer.send((spent["training"] + spent["last checkpoint"], dict(spent)))


def one_checkpoint(preset: str, folder: Path, answer: Connection) -> None:
    """Steps of the full shape alone and beside a write, and the seconds of each part of one checkpoint."""
    import torch

    from smolforge.checkpoint import training_state
    from smolforge.config import ModelConfig, Optim, presets
    from smolforge.data.batches import Batch
    from smolforge.models.decoder import build
    from smolforge.runs.async_checkpoint import BackgroundTask
    from smolforge.testing import tiny_tokenizer
    from smolforge.training.loop import forward_backward
    from smolforge.training.objective import Objective
    from smolforge.training.optim import build_optimizers, state_tensors

    model = build(ModelConfig.model_validate(presets.shape(preset)))
    model.tokenizer = tiny_tokenizer()
    chosen, objective = build_optimizers(model, Optim()), Objective(model)
    ids = torch.randint(model.config.vocab_size, (4, 512))

    def step() -> float:
        start = time.perf_counter()
        forward_backward(objective, Batch(ids, ids), ids.numel(), rows=4)
        for each in chosen:
            each.step()
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    found: dict[str, list[float]] = {"step alone": [], "step beside a write": [], "copy": [], "write": []}
    staging = training_state.StagingBuffer()

    def save(number: int) -> None:
        """Copy, then write beside one step; the time of each."""
        moment: list[training_state.Snapshot] = []
        tensors, target = state_tensors(chosen, model), training_state.checkpoint_dir(folder, number)
        found["copy"].append(
            seconds(
                lambda: moment.append(training_state.take_snapshot(model, tensors, {"step": number}, staging=staging))
            )
        )
        writing = BackgroundTask(
            lambda: found["write"].append(seconds(lambda: training_state.save_checkpoint(target, *moment))),
            "checkpoint",
        )
        found["step beside a write"].append(step())
        writing.result()

    step()
    for number in range(3):
        found["step alone"].append(step())
        save(number)
    newest = training_state.checkpoint_dir(folder, 2)
    found["check"] = [seconds(lambda: training_state.check_checkpoint(newest)) for _ in range(3)]
    found["load"] = [seconds(lambda: training_state.load_checkpoint(newest, model)) for _ in range(3)]
    answer.send((sum(path.stat().st_size for path in newest.rglob("*")), found))


def in_process(work: Callable[..., None], *arguments: Any) -> Any:
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=work, args=(*arguments, there))
    child.start()
    found = here.recv()
    child.join()
    return found


def spread(values: list[float], form: str = "{:.2f}") -> str:
    return f"{form} ({form} to {form})".format(statistics.median(values), min(values), max(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--preset", default="smollm2-135m")
    asked = parser.parse_args()
    totals: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    inside: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(asked.rounds):
            for kind, seconds in totals.items():
                folder = Path(scratch) / f"{kind}-{number}"
                total, parts = in_process(run_nano, kind, folder, asked.steps, asked.every)
                seconds.append(total)
                inside += [parts | {"total": total}] if kind == WITH else []
        size, found = in_process(one_checkpoint, asked.preset, Path(scratch) / "full")
    cores = len(os.sched_getaffinity(0))
    print(f"nano, {asked.steps} steps, a checkpoint every {asked.every}, {asked.rounds} rounds in turn\n")
    print("| | seconds (range) |\n|---|---|")
    for kind, seconds in totals.items():
        print(f"| {kind} | {spread(seconds)} |")
    ratios = [one / other for one, other in zip(totals[WITH], totals[WITHOUT], strict=True)]
    print(f"| with / without, by round | {spread(ratios, '{:.3f}')} |\n")
    print("| time inside | seconds | share of the whole |\n|---|---|---|")
    sums = Counter[str]()
    for parts in inside:
        for name, value in parts.items():
            sums[name] += (value / cores if "beside" in name else value) / len(inside)
    for name, value in sums.items():
        if name not in ("training", "total"):
            print(f"| {name} | {value:.3f} | {value / sums['total']:.2%} |")
    spent = sum(value for name, value in sums.items() if name not in ("training", "total"))
    print(
        f"| all (what runs beside counts by its share of {cores} cores) | {spent:.3f} | {spent / sums['total']:.2%} |\n"
    )
    print(f"one checkpoint of {asked.preset}, {size / 1e9:.2f} GB\n")
    print("| | seconds (range) |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {spread(values)} |")


if __name__ == "__main__":
    main()
