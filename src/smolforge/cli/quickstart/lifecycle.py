"""`smolforge quickstart`: train, interrupt, resume, evaluate and sample a small model, with proof."""

import json
import lzma
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.checkpoint import huggingface, training_state
from smolforge.cli.run_display import Display
from smolforge.comparison.figures import draw_loss_curve
from smolforge.config.load import read_recipe
from smolforge.data import corpus
from smolforge.errors import Stopped
from smolforge.evaluation import measure_corpus
from smolforge.generation.stream import generate
from smolforge.models.decoder import LanguageModel
from smolforge.runs import Run, resume_or_start
from smolforge.runs.estimate import tokens_per_second
from smolforge.training.run_folder import RECIPE

CHECKPOINT_EVERY, MIN_REPEATED_STEPS = 25, 20
PROMPTS = ("The", "Return the")


def run_quickstart(out: Path, seconds: int, show: Display, *, recipe: str = "nano") -> dict[str, Any]:
    """Run all steps, print them to `show`, and return the summary that is also written to summary.json."""
    start = time.perf_counter()
    show.print_line(f"1. Train a language model of the SmolLM2 family on Python's own documentation, in {out}.")
    run = train_with_interruption(recipe, out, plan_steps(recipe, seconds, out), show=show)
    show.stop()
    text = corpus.Corpus.open(out / "corpus")
    steps, python = run.recipe.train.steps, platform.python_version()
    show.print_line("\n3. How well does it predict packages it has never seen? Bits per byte; less is better.")
    summary: dict[str, Any] = {"steps": steps, "python": python, **score_run(run, text)}
    show.print_line(score_lines(summary))
    show.print_line("\n4. What it writes:")
    summary["samples"] = sample_texts(run.model)
    for sample in summary["samples"]:
        show.print_line(f"   | {' '.join(sample.split())}")
    show.print_line("\n5. Is resuming exact? A fresh process repeats the last steps from an earlier checkpoint.")
    summary["resume"] = prove_resume(out)
    show.print_line(proof_lines(summary["resume"]))
    summary["figure"] = str(out / "loss.png")
    draw_loss_curve(out, out / "loss.png", f"{steps} steps on the documentation of Python {python}")
    summary["seconds"] = time.perf_counter() - start
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8", newline="\n")
    show.print_line(f"\n   the loss curve is in {summary['figure']}; all of this took {summary['seconds']:.0f} s")
    show.print_line(next_commands(out))
    return summary


def plan_steps(name: str, seconds: int, out: Path) -> dict[str, Any]:
    """Return overrides with as many steps as this machine trains in the time, a multiple of the checkpoint interval."""
    if (out / RECIPE).is_file():
        steps = read_recipe(out / RECIPE).train.steps
    else:
        recipe = read_recipe(name)
        estimated_steps = seconds * tokens_per_second(recipe) / recipe.train.batch_tokens
        steps = CHECKPOINT_EVERY * max(2, round(estimated_steps / CHECKPOINT_EVERY))
    interval = CHECKPOINT_EVERY * max(1, steps // CHECKPOINT_EVERY // 6)
    return {
        "train.steps": steps,
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.evaluate_every": interval,
        "train.sample_every": interval,
    }


def train_with_interruption(recipe: str, out: Path, overrides: dict[str, Any], *, show: Display) -> Run:
    """Stop half-way by a real signal, as Ctrl-C sends it, then resume."""
    sent: list[int] = []

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["step"] == overrides["train.steps"] // 2 and not sent:
            sent.append(metrics["step"])
            signal.raise_signal(signal.SIGINT)

    if not training_state.list_checkpoints(out):
        show.listeners.append(interrupt)
        try:
            return resume_or_start(recipe, out, overrides, listener=show)
        except Stopped as stopped:
            if not sent:  # the user's own Ctrl-C
                raise
            show.stop()
            show.print_line(f"\n2. Ctrl-C, sent by the quickstart itself: {stopped}.")
    return resume_or_start(recipe, out, overrides, listener=show)


def score_run(run: Run, text: corpus.Corpus) -> dict[str, Any]:
    """Return held-out bits per byte: of the model, of xz alone, and of xz primed with the training text."""
    window, document_masking = run.recipe.train.sequence_length, run.recipe.data.intra_document_masking
    metrics = measure_corpus(run.model, text, window, stride=window // 4, intra_document_masking=document_masking)
    train, held_out = (text.text(split).encode() for split in corpus.SPLITS)
    xz_bytes, train_xz_bytes = (len(lzma.compress(part, preset=9)) for part in (held_out, train))
    primed_xz_bytes = len(lzma.compress(train + held_out, preset=9)) - train_xz_bytes
    return {
        "parameters": sum(weight.numel() for weight in run.model.parameters()),
        "held_out_bytes": len(held_out),
        "bits_per_byte": metrics["bits_per_byte"],
        "accuracy": metrics["accuracy"],
        "xz_bits_per_byte": 8 * xz_bytes / len(held_out),
        "xz_primed_bits_per_byte": 8 * primed_xz_bytes / len(held_out),
    }


def score_lines(summary: dict[str, Any]) -> str:
    bits_per_byte = summary["bits_per_byte"]
    lines = [f"   this model      {bits_per_byte:.3f}  ({summary['parameters']:,} parameters)"]
    for name, key in (("xz -9 alone", "xz_bits_per_byte"), ("xz -9 primed", "xz_primed_bits_per_byte")):
        verdict = "beaten" if bits_per_byte < summary[key] else "not beaten"
        lines.append(f"   {name:<15} {summary[key]:.3f}  ({verdict})")
    footer = f"   {summary['held_out_bytes']:,} bytes of whole packages held out, of Python {summary['python']};"
    return "\n".join([*lines, footer, "   primed: xz had the training text before it, as the model had."])


def sample_texts(model: LanguageModel) -> list[str]:
    options = {"max_new_tokens": 60, "temperature": 0.7, "top_p": 0.95, "seed": 0}
    completions = generate(model, PROMPTS, **options)
    return [prompt + completion.text for prompt, completion in zip(PROMPTS, completions, strict=True)]


def prove_resume(out: Path) -> dict[str, Any]:
    """Copy an earlier checkpoint, resume it to the end in a fresh process, and compare hashes."""
    *before, last = training_state.list_checkpoints(out)
    latest = training_state.step_from_dir(last) - MIN_REPEATED_STEPS
    candidates = [folder for folder in before if training_state.step_from_dir(folder) <= latest]
    earlier = (candidates or before)[-1]
    copy = out / "resumed"
    shutil.rmtree(copy, ignore_errors=True)
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(out / RECIPE, copy)
    shutil.copytree(out / "corpus", copy / "corpus")
    shutil.copytree(earlier, copy / "checkpoints" / earlier.name)
    command = [sys.executable, "-m", "smolforge", "train", str(copy / RECIPE), "--run", str(copy), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    original, resumed = state_hashes(last), state_hashes(copy / "checkpoints" / last.name)
    return {"from": earlier.name, "to": last.name, "sha256": original, "equal": original == resumed}


def state_hashes(checkpoint: Path) -> dict[str, str]:
    """Return the sha256 of a checkpoint's weights and optimizer state, by file."""
    files = atomic.read_manifest(checkpoint)["files"]
    names = (huggingface.WEIGHTS, f"{training_state.TRAINING}/{training_state.OPTIMIZER}")
    return {name: files[name]["sha256"] for name in names}


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
