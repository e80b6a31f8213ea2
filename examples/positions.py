"""Loss by position: what a model trained on short rows makes of long ones, and what repairs it.

    python examples/positions.py [--steps 400] [--out docs]

1. Trains the nano model on rows of 256 tokens. 2. Measures its loss at every position of rows of 1024 held-out
tokens, with its theta and with a raised one. 3. Goes on from it for a tenth of its steps on rows of 1024, with the
old theta and the raised one, and, for comparison, on rows of 256. SmolLM2 went from 2048 to 8192 tokens so.
Writes positions.svg, and the table into positions.md, between its two marks.
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
from smolforge.models.decoder import LanguageModel, adapt_to_config

SHORT, LONG, THETA, RAISED = 256, 1024, 1e4, 1e5
EDGES = (0, 16, 64, 128, SHORT, 384, 512, 768, LONG)
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
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
    found = {"trained on 256": first.model, "theta raised, not trained": adapt_to_config(first.model, raised)}
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


def bins(losses: np.ndarray) -> np.ndarray:
    """Mean loss of each stretch of positions, window by window."""
    return np.stack([losses[:, start:end].mean(1) for start, end in itertools.pairwise(EDGES)], 1)


def draw(found: dict[str, np.ndarray], out: Path) -> None:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    middle = [(start + end) / 2 for start, end in itertools.pairwise(EDGES)]
    for name, losses in found.items():
        color, line = STYLES[name]
        axes.plot(middle, losses.mean(0), color=color, linestyle=line, marker="o", ms=3, label=name)
    axes.axvline(SHORT, color="#888888", linewidth=0.8)
    axes.text(SHORT, 0.02, " trained length", transform=axes.get_xaxis_transform(), color="#555555")
    axes.set(xlabel="position in the row (tokens before it)", ylabel="held-out loss (nats a token)")
    axes.set_title("Loss by position, before and after a long-context step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.3, 1))
    figure.savefig(out, metadata={"Date": None})


def table(found: dict[str, np.ndarray]) -> str:
    """The loss of the first model, and of every other its difference to it, with the standard error of that."""
    heads = [f"{start} to {end}" for start, end in itertools.pairwise(EDGES)]
    (first, base), *others = found.items()
    rows = [f"| {first}: loss | " + " | ".join(f"{mean:.3f}" for mean in base.mean(0)) + " |"]
    for name, losses in others:
        apart = losses - base
        errors = apart.std(0, ddof=1) / len(apart) ** 0.5
        cells = [f"{mean:+.3f} ± {error:.3f}" for mean, error in zip(apart.mean(0), errors, strict=True)]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([f"| positions | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *rows])


def main(steps: int = 400, out: Path = Path("docs"), overrides: dict[str, Any] | None = None) -> str:
    """Run the study; returns the page it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        contestants, corpus = models(Path(folder), steps, overrides or {})
        ids, eos_id = corpus.tokens(HELD_OUT)[:], corpus.metadata["eos_id"]
        found = {name: bins(loss_by_position(model, ids, eos_id, length=LONG)) for name, model in contestants.items()}
        trained = corpus.size(TRAIN)["tokens"]
    out.mkdir(parents=True, exist_ok=True)
    draw(found, out / "positions.svg")
    page = (
        f"{steps} steps on rows of {SHORT} tokens, then {steps // 10} more from there (fresh Muon, a tenth of "
        f"the learning rate);\n{trained:,} tokens of Python's documentation to train on, {len(ids) // LONG} windows "
        f"of {LONG} held-out tokens, one seed.\nBelow the first line: difference to it, and its standard error over "
        f"the windows, which all models read alike.\n\n{table(found)}\n"
    )
    written = out / "positions.md"
    before, _, after = (written.read_text("utf-8") if written.is_file() else f"{BEGIN}{END}").partition(BEGIN)
    written.write_text(f"{before}{BEGIN}\n{page}{END}{after.partition(END)[2]}", "utf-8")
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    asked = parser.parse_args()
    print(main(asked.steps, asked.out))
