"""What is measured of a study's finished runs, each once: kept in a file, and measured again where that is deleted.

OUT/rounded/RUN.json   held-out loss before and after rounding the matrices to 4 bits
OUT/tasks/RUN.json     multiple-choice scores; once every run has them, no task is loaded again
OUT/decoding.json      tokens/s of each variant in each round
OUT/memory.json        bytes at the peak of each variant's training, in a process of its own
"""

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.checkpoint.loading import load
from smolforge.comparison.history import RunHistory, read_history
from smolforge.config import Generation
from smolforge.data.corpus import Corpus
from smolforge.device import pick_device
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation.multiple_choice import score, summary
from smolforge.evaluation.perplexity import measure_corpus
from smolforge.evaluation.tasks import Task, load_task
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate_tokens
from smolforge.models.decoder import LanguageModel
from smolforge.models.quantized import QuantizationScheme, quantize

log = logging.getLogger("smolforge")
DECODING, MEMORY = "decoding.json", "memory.json"
ROUNDED_TOKENS = 65_536
"""Held-out tokens at most: what rounding adds is small beside what texts differ by."""
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
TaskScores = dict[str, dict[str, Any]]
"""By task, as `evaluate` gives them: acc, acc_norm, acc_chars, their standard errors, n, source."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file is missing."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file and its folder."""
    atomic.make_dir_durable(path.parent)
    atomic.write_text_atomic(path, json.dumps(content, indent=2) + "\n")


def measure_once(
    path: Path, is_complete: Callable[[dict[str, Any]], bool], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return what a file holds if that is complete, or else what is measured and written into it."""
    stored = read_json(path)
    if not is_complete(stored):
        stored = measure()
        write_json(path, stored)
    return stored


def int4_loss_increase(run: RunHistory, corpus: Corpus, group_size: int, *, path: Path) -> float:
    """Nats a token, the embedding as it was. Raises ConfigError where groups do not divide the model's widths."""

    def measure() -> dict[str, Any]:
        model, length = load(run.path), run.recipe.train.sequence_length
        before = measure_corpus(model, corpus, length, max_tokens=ROUNDED_TOKENS)["loss"]
        quantize(model, QuantizationScheme(4, group_size))
        after = measure_corpus(model, corpus, length, max_tokens=ROUNDED_TOKENS)["loss"]
        return {"group_size": group_size, "before": before, "after": after}

    def is_complete(stored: Mapping[str, Any]) -> bool:
        return stored.keys() >= {"before", "after"} and stored.get("group_size") == group_size

    losses = measure_once(path, is_complete, measure)
    return float(losses["after"] - losses["before"])


class TaskEvaluator:
    """What every run is asked; `task_args` are names and files, those beside the study's file first."""

    def __init__(self, task_args: Sequence[str], study_dir: Path, out: Path) -> None:
        self.task_args, self.study_dir, self.folder = tuple(task_args), study_dir, out / "tasks"
        self.names = [Path(task).stem for task in task_args]
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"study.tasks has two that are called the same: {', '.join(task_args)}")

    @cached_property
    def tasks(self) -> list[Task]:
        """Raises ConfigError, InvalidFileError or MissingResourceError for what is no task, or cannot be had."""
        return [load_task(str(path) if (path := self.study_dir / task).is_file() else task) for task in self.task_args]

    def is_complete(self, scores: Mapping[str, Any]) -> bool:
        """Whether a run was asked all of them."""
        return all(isinstance(scores.get(name), dict) for name in self.names)

    def path(self, run: str) -> Path:
        return self.folder / f"{run}.json"

    def prepare(self, runs: Sequence[str]) -> None:
        """Find the tasks, before the first run, where one of these is still to be asked."""
        if not all(self.is_complete(read_json(self.path(run))) for run in runs):
            assert len(self.tasks) == len(self.task_args)

    def evaluate(self, run: str, folder: Path, device: str) -> TaskScores:
        """Its scores, asked in fp32 as `evaluate` does. Raises InvalidFileError for an item longer than its context."""

        def measure() -> TaskScores:
            model = load(folder, device=str(pick_device(device)))
            return {task.name: summary(score(model, task.items)) | {"source": task.source} for task in self.tasks}

        return measure_once(self.path(run), self.is_complete, measure)


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
    source = generate_tokens(model, [[0]], make_sampler(Generation(temperature=0.0)), max_new_tokens=DECODE_TOKENS + 1)
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
    settings = {**changes, **every_step, **quiet, "train.steps": min(MEMORY_STEPS, steps)}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = json.dumps([[*sys.path, str(classes_dir)], str(recipe), str(run), settings])
        child = subprocess.run([sys.executable, "-c", CHILD_SCRIPT, arguments], capture_output=True, check=False)
        try:
            peak = read_history(run).newest("peak_memory_bytes")
        except InvalidFileError:
            peak = None
    if child.returncode or peak is None:
        last_line = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        log.warning("memory could not be measured: %s", *(last_line or ["the process ended without a word"]))
        return None
    return int(peak)
