"""What each variant costs this machine: how fast it decodes, and the most memory its training takes.

OUT/decoding.json   tokens/s of each round          OUT/memory.json   the peak of a process of its own

After all runs. Both are kept; where one of the files is deleted, the same command measures that again.
"""

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smolforge import atomic
from smolforge.checkpoint.loading import load
from smolforge.comparison.history import read_history
from smolforge.config import Generation
from smolforge.device import pick_device
from smolforge.errors import InvalidFileError
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate_tokens
from smolforge.models.decoder import LanguageModel

log = logging.getLogger("smolforge")
DECODING, MEMORY = "decoding.json", "memory.json"
ROUNDS, DECODE_TOKENS = 7, 64
"""How often each variant decodes how many tokens, after one round that does not count."""
MEMORY_STEPS = 2
"""Of training: after the first all moments are there, and a checkpoint was copied."""
CHILD_SCRIPT = """
import json, sys
sys.path[:], recipe, folder, changes = json.loads(sys.argv[1])
from smolforge.runs import resume_or_start
resume_or_start(recipe, folder, changes)
"""


class VariantMeasurements(NamedTuple):
    """Of each variant; those that were not measured are missing."""

    decoding: dict[str, list[float]]
    """Tokens/s of each round."""
    memory: dict[str, int | None]
    """Bytes."""


def load_or_measure(path: Path, names: Collection[str], measure: Callable[[], dict[str, Any]] | None) -> dict[str, Any]:
    """What a file holds of all these, or else what is measured and written into it, where that is wanted."""
    try:
        stored = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        stored = {}
    if set(names) <= set(stored) or measure is None:
        return stored
    measured = measure()
    atomic.write_text_atomic(path, json.dumps(measured, indent=2) + "\n")
    return measured


def decoding_speeds(runs: Mapping[str, tuple[Path, str]]) -> dict[str, list[float]]:
    """Tokens/s of each variant in each round, in turn, so that a machine that slows down slows all.

    `runs` has a finished run of each and its device. Weights are fp32, as `generate` loads them.
    """
    models = {name: load(run, device=str(pick_device(device))) for name, (run, device) in runs.items()}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(ROUNDS + 1):
        for name in list(models)[:: 1 if number % 2 else -1]:
            speed = decoding_speed(models[name])
            if number:
                speeds[name].append(speed)
    return speeds


def decoding_speed(model: LanguageModel) -> float:
    """Tokens/s of greedy decoding behind the first token, one row, from an empty context on."""
    greedy = make_sampler(Generation(temperature=0.0))
    source = generate_tokens(model, [[0]], greedy, max_new_tokens=DECODE_TOKENS + 1)
    next(source)
    start = time.perf_counter()
    count = sum(1 for _ in source)
    return count / (time.perf_counter() - start)


def peak_memory(recipe: Path, changes: Mapping[str, Any], steps: int, *, classes_dir: Path) -> int | None:
    """Peak of the first steps, measuring and saving included, as that run itself reports it; None where it failed.

    The schedule keeps its horizon of `steps`. In a process of its own, since a process' peak never falls, which looks
    for a person's own classes in the folder `classes_dir` too.
    """
    every_step = {f"train.{name}": 1 for name in ("checkpoint_every", "evaluate_every")}
    quiet = {"train.sample_every": None, "report.to": None, "optim.schedule.steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = [
            [*sys.path, str(classes_dir)],
            str(recipe),
            str(run),
            {**changes, **every_step, **quiet, "train.steps": min(MEMORY_STEPS, steps)},
        ]
        child = subprocess.run(
            [sys.executable, "-c", CHILD_SCRIPT, json.dumps(arguments)], capture_output=True, check=False
        )
        try:
            peak = read_history(run).newest("peak_memory_bytes")
        except InvalidFileError:
            peak = None
    if child.returncode or peak is None:
        last_line = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        log.warning("memory could not be measured: %s", *(last_line or ["the process ended without a word"]))
        return None
    return int(peak)
