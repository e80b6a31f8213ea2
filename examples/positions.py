"""Loss by position: what a model trained on short rows makes of long ones, and what repairs it.

    python examples/positions.py [--steps 400] [--out docs]

1. Trains the nano model on rows of 256 tokens. 2. Measures its loss at every position of rows of 1024 held-out
tokens, with its theta and with a raised one. 3. Goes on from it for a tenth of its steps on rows of 1024, with the
old theta and the raised one, and, for comparison, on rows of 256. SmolLM2 went from 2048 to 8192 tokens so.
Writes positions.svg and positions.md.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from smolforge import train
from smolforge.data.corpus import HELD_OUT, TRAIN, Corpus
from smolforge.evaluation import loss_by_position
from smolforge.model import LanguageModel, adapted

SHORT, LONG, THETA, RAISED = 256, 1024, 1e4, 1e5
EDGES = (0, 16, 64, 128, SHORT, 384, 512, 768, LONG)
STYLES = {
    "trained on 256": ("#000000", "-"),
    "theta raised, not trained": ("#888888", "--"),
    "+ a tenth more on 256": ("#0072b2", ":"),
    "+ a tenth more on 1024": ("#d55e00", "-."),
    "+ a tenth more on 1024, theta raised": ("#009e73", "-"),
}


def models(folder: Path, steps: int, overrides: dict[str, Any]) -> tuple[dict[str, LanguageModel], Corpus]:
    """Every contestant by its name, and the corpus."""
    common = {"model.max_position_embeddings": LONG, "data.held_out": 0.15, "train.sample_every": None} | overrides
    first = train("nano", folder / "short", steps=steps, **common)
    corpus = Corpus.open(folder / "short" / "corpus")
    raised = first.recipe.model.model_copy(update={"rope_theta": RAISED})
    found = {"trained on 256": first.model, "theta raised, not trained": adapted(first.model, raised)}
    for name, length, theta in zip(list(STYLES)[2:], (SHORT, LONG, LONG), (THETA, THETA, RAISED), strict=True):
        changes = {
            "init_from": str(first.folder),
            "model.rope_theta": theta,
            "train.sequence_length": length,
            "train.steps": steps // 10,
            "optim.learning_rate": first.recipe.optim.learning_rate / 10,
            "optim.matrix_learning_rate": first.recipe.optim.matrix_learning_rate / 10,
            "data.sources": [str(corpus.folder)],
        }
        found[name] = train("nano", folder / f"{length}-{theta:g}", **common | changes).model
    return found, corpus


def bins(losses: np.ndarray) -> list[tuple[float, float]]:
    """Mean loss and its standard error (over windows) of each stretch of positions."""
    stretches = [losses[:, start:end].mean(1) for start, end in itertools.pairwise(EDGES)]
    return [(each.mean(), each.std(ddof=1) / len(each) ** 0.5) for each in stretches]


def draw(found: dict[str, list[tuple[float, float]]], out: Path) -> None:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    middle = [(start + end) / 2 for start, end in itertools.pairwise(EDGES)]
    for name, points in found.items():
        color, line = STYLES[name]
        axes.errorbar(middle, *zip(*points, strict=True), color=color, linestyle=line, marker="o", ms=3, label=name)
    axes.axvline(SHORT, color="#888888", linewidth=0.8)
    axes.text(SHORT, 0.98, " trained length", transform=axes.get_xaxis_transform(), va="top", color="#555555")
    axes.set(xlabel="position in the row (tokens before it)", ylabel="held-out loss (nats a token)")
    axes.set_title("Loss by position, before and after a long-context step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


def table(found: dict[str, list[tuple[float, float]]]) -> str:
    heads = [f"{start} to {end}" for start, end in itertools.pairwise(EDGES)]
    rows = [f"| {name} | " + " | ".join(f"{mean:.3f}" for mean, _ in points) + " |" for name, points in found.items()]
    return "\n".join([f"| positions | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *rows])


def main(steps: int = 400, out: Path = Path("docs"), overrides: dict[str, Any] | None = None) -> str:
    """Run the study; returns the page it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        contestants, corpus = models(Path(folder), steps, overrides or {})
        ids, eos_id = corpus.tokens(HELD_OUT)[:], corpus.facts["eos_id"]
        found = {name: bins(loss_by_position(model, ids, eos_id, LONG)) for name, model in contestants.items()}
        trained = corpus.size(TRAIN)["tokens"]
    widest = max(error for points in found.values() for _, error in points)
    out.mkdir(parents=True, exist_ok=True)
    draw(found, out / "positions.svg")
    page = (
        f"{steps} steps on rows of {SHORT} tokens, then {steps // 10} more from there (fresh Muon, a tenth of "
        f"the learning rate);\n{trained:,} tokens of Python's documentation to train on, {len(ids) // LONG} windows "
        f"of {LONG} held-out tokens.\nOne seed. Standard error over windows: at most {widest:.3f}; the models read "
        f"the same windows, so differences are surer.\n\n{table(found)}\n"
    )
    (out / "positions.table.md").write_text(page)
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    asked = parser.parse_args()
    print(main(asked.steps, asked.out))
