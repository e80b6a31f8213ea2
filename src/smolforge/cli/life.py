"""The whole life of a small model, with proof: what `smolforge quickstart` does and says."""

import json
import lzma
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolforge import commit
from smolforge.checkpoint import state, weights
from smolforge.cli.terminal import Display
from smolforge.comparison.figures import loss_curve
from smolforge.data import corpus
from smolforge.errors import Stopped
from smolforge.evaluation import measure_corpus
from smolforge.generation.stream import generate
from smolforge.model import LanguageModel
from smolforge.recipe import Run, resume_or_start
from smolforge.recipe.plan import tokens_per_second
from smolforge.recipe.read import read_recipe
from smolforge.runs import RECIPE

CHECKPOINT_EVERY, FEWEST_REPEATED = 25, 20
PROMPTS = ("The", "Return the")


def live(out: Path, seconds: int, show: Display, recipe: str = "nano") -> dict[str, Any]:
    """All of it, told to `show`; returns the summary that is also written to summary.json."""
    begun = time.perf_counter()
    show.say(f"1. Train a language model of the SmolLM2 family on Python's own documentation, in {out}.")
    run = train_with_interruption(recipe, out, plan_steps(recipe, seconds, out), show)
    show.stop()
    text = corpus.Corpus.open(out / "corpus")
    steps, python = run.recipe.train.steps, platform.python_version()
    show.say("\n3. How well does it predict packages it has never seen? Bits per byte; less is better.")
    summary: dict[str, Any] = {"steps": steps, "python": python, **score(run, text)}
    show.say(score_lines(summary))
    show.say("\n4. What it writes:")
    summary["samples"] = samples(run.model)
    for sample in summary["samples"]:
        show.say(f"   | {' '.join(sample.split())}")
    show.say("\n5. Is resuming exact? A fresh process repeats the last steps from an earlier checkpoint.")
    summary["resume"] = prove_resume(out)
    show.say(proof_lines(summary["resume"]))
    summary["figure"] = str(out / "loss.png")
    loss_curve(out, out / "loss.png", f"{steps} steps on the documentation of Python {python}")
    summary["seconds"] = time.perf_counter() - begun
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    show.say(f"\n   the loss curve is in {summary['figure']}; all of this took {summary['seconds']:.0f} s")
    show.say(next_commands(out))
    return summary


def plan_steps(name: str, seconds: int, out: Path) -> dict[str, Any]:
    """As many steps of the nano recipe as this machine does in the time, in whole checkpoints."""
    if (out / RECIPE).is_file():
        steps = read_recipe(out / RECIPE).train.steps
    else:
        recipe = read_recipe(name)
        done = seconds * tokens_per_second(recipe) / recipe.train.batch_tokens
        steps = CHECKPOINT_EVERY * max(2, round(done / CHECKPOINT_EVERY))
    every = CHECKPOINT_EVERY * max(1, steps // CHECKPOINT_EVERY // 6)
    return {
        "train.steps": steps,
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.evaluate_every": every,
        "train.sample_every": every,
    }


def train_with_interruption(recipe: str, out: Path, overrides: dict[str, Any], show: Display) -> Run:
    """Stop half-way by a real signal, as Ctrl-C sends it, then go on."""
    half = overrides["train.steps"] // 2
    if not state.all_of(out):
        with interrupting(show, half) as sent:
            try:
                return resume_or_start(recipe, out, overrides, observer=show)
            except Stopped as stopped:
                if not sent:  # a person's own Ctrl-C
                    raise
                show.stop()
                show.say(f"\n2. Ctrl-C, sent by the quickstart itself: {stopped}.")
    return resume_or_start(recipe, out, overrides, observer=show)


@contextmanager
def interrupting(show: Display, step: int) -> Iterator[list[int]]:
    """Raise SIGINT once the display is shown this step; the list says whether that was done."""
    sent: list[int] = []

    def told(metrics: dict[str, Any]) -> None:
        if metrics["step"] == step:
            sent.append(step)
            signal.raise_signal(signal.SIGINT)

    show.listeners.append(told)
    try:
        yield sent
    finally:
        show.listeners.remove(told)


def score(run: Run, text: corpus.Corpus) -> dict[str, Any]:
    """Held-out bits per byte of the model, of xz on that text alone, and of xz that has read what the model read."""
    window, inside = run.recipe.train.sequence_length, run.recipe.data.intra_document_masking
    found = measure_corpus(run.model, text, window, stride=window // 4, intra_document_masking=inside)
    train, held = (text.text(split).encode() for split in corpus.SPLITS)
    packed, primer = (len(lzma.compress(part, preset=9)) for part in (held, train))
    primed = len(lzma.compress(train + held, preset=9)) - primer
    return {
        "parameters": sum(weight.numel() for weight in run.model.parameters()),
        "held_out_bytes": len(held),
        "bits_per_byte": found["bits_per_byte"],
        "accuracy": found["accuracy"],
        "xz_bits_per_byte": 8 * packed / len(held),
        "xz_primed_bits_per_byte": 8 * primed / len(held),
    }


def score_lines(summary: dict[str, Any]) -> str:
    ours = summary["bits_per_byte"]
    lines = [f"   this model      {ours:.3f}  ({summary['parameters']:,} parameters)"]
    for name, key in (("xz -9 alone", "xz_bits_per_byte"), ("xz -9 primed", "xz_primed_bits_per_byte")):
        verdict = "beaten" if ours < summary[key] else "not beaten"
        lines.append(f"   {name:<15} {summary[key]:.3f}  ({verdict})")
    said = f"   {summary['held_out_bytes']:,} bytes of whole packages held out, of Python {summary['python']};"
    return "\n".join([*lines, said, "   primed: xz had the training text before it, as the model had."])


def samples(model: LanguageModel) -> list[str]:
    options = {"max_new_tokens": 60, "temperature": 0.7, "top_p": 0.95, "seed": 0}
    found = generate(model, PROMPTS, **options)
    return [prompt + completion.text for prompt, completion in zip(PROMPTS, found, strict=True)]


def prove_resume(out: Path) -> dict[str, Any]:
    """Copy the checkpoint before the last, let a fresh process go on from it to the end, compare hashes."""
    *before, last = state.all_of(out)
    far = [folder for folder in before if state.step_of(folder) <= state.step_of(last) - FEWEST_REPEATED]
    earlier = (far or before)[-1]
    copy = out / "resumed"
    shutil.rmtree(copy, ignore_errors=True)
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(out / RECIPE, copy)
    shutil.copytree(out / "corpus", copy / "corpus")
    shutil.copytree(earlier, copy / "checkpoints" / earlier.name)
    command = [sys.executable, "-m", "smolforge", "train", str(copy / RECIPE), "--run", str(copy), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    files = (weights.WEIGHTS, f"{state.TRAINING}/{state.OPTIMIZER}")
    hashes = {
        name: [
            commit.read_manifest(folder)["files"][name]["sha256"] for folder in (last, copy / "checkpoints" / last.name)
        ]
        for name in files
    }
    return {
        "from": earlier.name,
        "to": last.name,
        "sha256": {name: pair[0] for name, pair in hashes.items()},
        "equal": all(one == other for one, other in hashes.values()),
    }


def proof_lines(proof: dict[str, Any]) -> str:
    lines = [f"   {proof['from']} -> {proof['to']}: " + ("equal to the bit" if proof["equal"] else "NOT equal")]
    return "\n".join(lines + [f"   sha256 {digest}  {name}" for name, digest in proof["sha256"].items()])


def next_commands(out: Path) -> str:
    return f"""
Next:
   smolforge generate {out} --prompt "def "
   smolforge compare {out} --out report
   smolforge train nano --run runs/mine --data.sources FILE_OR_FOLDER_OF_TEXT --budget 5m
   smolforge inspect smollm2-135m"""
