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
from smolforge.comparison.history import read
from smolforge.config import Generation
from smolforge.device import pick_device
from smolforge.errors import InvalidFile
from smolforge.generation.samplers import sampling
from smolforge.generation.stream import tokens
from smolforge.models.decoder import LanguageModel

log = logging.getLogger("smolforge")
DECODING, MEMORY = "decoding.json", "memory.json"
ROUNDS, DECODED = 7, 64
"""How often each variant decodes how many tokens, after one round that does not count."""
STEPS = 2
"""Of training: after the first all moments are there, and a checkpoint was copied."""
CHILD = """
import json, sys
sys.path[:], recipe, folder, changes = json.loads(sys.argv[1])
from smolforge.recipe import resume_or_start
resume_or_start(recipe, folder, changes)
"""


class Measured(NamedTuple):
    """Of each variant; those that were not measured are missing."""

    decoding: dict[str, list[float]]
    """Tokens/s of each round."""
    memory: dict[str, int | None]
    """Bytes."""


def kept(path: Path, names: Collection[str], measure: Callable[[], dict[str, Any]] | None) -> dict[str, Any]:
    """What a file holds of all these, or else what is measured and written into it, where that is wanted."""
    try:
        stored = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        stored = {}
    if set(names) <= set(stored) or measure is None:
        return stored
    found = measure()
    atomic.replace(path, json.dumps(found, indent=2) + "\n")
    return found


def decoding(runs: Mapping[str, tuple[Path, str]]) -> dict[str, list[float]]:
    """Tokens/s of each variant in each round, in turn, so that a machine that slows down slows all.

    `runs` has a finished run of each and its device. Weights are fp32, as `generate` loads them.
    """
    models = {name: load(run, device=str(pick_device(device))) for name, (run, device) in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    for number in range(ROUNDS + 1):
        for name in list(models)[:: 1 if number % 2 else -1]:
            speed = decoded(models[name])
            if number:
                found[name].append(speed)
    return found


def decoded(model: LanguageModel) -> float:
    """Tokens/s of greedy decoding behind the first token, one row, from an empty context on."""
    greedy = sampling(Generation(temperature=0.0))
    source = tokens(model, [[0]], greedy, DECODED + 1)
    next(source)
    begun = time.perf_counter()
    count = sum(1 for _ in source)
    return count / (time.perf_counter() - begun)


def peak_memory(recipe: Path, changes: Mapping[str, Any], steps: int, beside: Path) -> int | None:
    """Peak of the first steps, measuring and saving included, as that run itself reports it; None where it failed.

    The schedule keeps its horizon of `steps`. In a process of its own, since a process' peak never falls, which looks
    for a person's own classes in the folder `beside` too.
    """
    often = {f"train.{name}": 1 for name in ("checkpoint_every", "evaluate_every")}
    quiet = {"train.sample_every": None, "report.to": None, "optim.schedule.steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        asked = [
            [*sys.path, str(beside)],
            str(recipe),
            str(run),
            {**changes, **often, **quiet, "train.steps": min(STEPS, steps)},
        ]
        child = subprocess.run([sys.executable, "-c", CHILD, json.dumps(asked)], capture_output=True, check=False)
        try:
            peak = read(run).newest("peak_memory_bytes")
        except InvalidFile:
            peak = None
    if child.returncode or peak is None:
        said = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        log.warning("memory could not be measured: %s", *(said or ["the process ended without a word"]))
        return None
    return int(peak)
