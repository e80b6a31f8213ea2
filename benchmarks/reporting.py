"""What it costs that a run is told of: the nano recipe with its default trackers, with all, and with none.

    python benchmarks/reporting.py [--rounds 3] [--steps 60]

Runs come in turn, each in a fresh process. The time inside is summed, of the training thread, over the time from the
first batch to the last step: trackers, lines of metrics, norms, and what is asked of the machine. `watched` also has
norms and histograms of every tensor every ten steps, which nobody gets who does not ask.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from reliability import in_process, spread, timed

APART = "start and end"
KINDS: dict[str, dict[str, Any]] = {
    "none": {"report.to": "none", "report.norms_every": "none"},
    "default": {},
    "all three": {"report.to": ["tensorboard", "wandb", "trackio"]},
    "watched": {"report.watch": "all", "report.watch_every": 10},
}


def run_nano(kind: str, folder: Path, steps: int, answer: Connection) -> None:
    """Train; send (seconds, seconds by part)."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio")}
    from smolforge import tracking
    from smolforge.device.usage import ResourceUsage
    from smolforge.runs import callbacks, run, train
    from smolforge.tracking.histograms import Watch
    from smolforge.training import run_folder

    spent: Counter[str] = Counter()
    timed(run, "train", spent, "training", time.perf_counter)
    timed(run_folder.RunFolder, "append", spent, "metrics.jsonl", time.perf_counter)
    timed(callbacks.TrainingCallbacks, "log_weight_norm", spent, "norm of the weights", time.perf_counter)
    timed(ResourceUsage, "sample", spent, "use of the machine", time.perf_counter)
    timed(Watch, "gradients", spent, "watching", time.perf_counter)
    timed(Watch, "finish_step", spent, "watching", time.perf_counter)
    timed(tracking.Trackers, "__call__", spent, "trackers", time.perf_counter)
    begun = tracking.Trackers.__call__

    def after_the_start(trackers: tracking.Trackers, event: object) -> None:
        """Connecting and importing happen once, before the first step; they are no part of a step."""
        before = spent["trackers"]
        begun(trackers, event)
        if isinstance(event, tracking.Started | tracking.Ended):
            spent[APART] += spent["trackers"] - before
            spent["trackers"] = before

    tracking.Trackers.__call__ = after_the_start
    often = {"train.evaluate_every": "none", "train.sample_every": 20, "train.checkpoint_every": "none"}
    train("nano", folder / "run", steps=steps, **{"optim.schedule.steps": 1000, **often, **KINDS[kind]})
    answer.send((spent.pop("training"), dict(spent)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, dict[str, float]]]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind, results in found.items():
            with tempfile.TemporaryDirectory() as folder:
                results.append(in_process(run_nano, kind, Path(folder), options.steps))
    print("| told to | share of training | milliseconds a step | times the seconds of none | start and end |")
    print("|---|---|---|---|---|")
    for kind, results in found.items():
        inside = [sum(parts.values()) - parts.get(APART, 0.0) for _, parts in results]
        shares = [within / whole for within, (whole, _) in zip(inside, results, strict=True)]
        ratios = [whole / none for (whole, _), (none, _) in zip(results, found["none"], strict=True)]
        each = statistics.median(inside) / options.steps * 1e3
        apart = statistics.median(parts.get(APART, 0.0) for _, parts in results)
        print(f"| {kind} | {spread(shares, '{:.2%}')} | {each:.2f} | {spread(ratios)} | {apart:.1f} s |")
    for kind, results in found.items():
        parts = {name: statistics.median(part[name] for _, part in results) for name in results[0][1] if name != APART}
        said = ", ".join(f"{name} {1e3 * seconds / options.steps:.2f}" for name, seconds in parts.items())
        print(f"\n{kind}, milliseconds a step: {said}")


if __name__ == "__main__":
    main()
