"""Runs to figures."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from smolforge.runs import METRICS
from smolforge.runs.journal import read_records

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#888888"
"""From Okabe and Ito's palette, told apart by colour-blind people."""


def loss_curve(run: Path, out: Path, title: str, marks: dict[int, str] | None = None) -> None:
    """The run's loss on what it learns from and on held-out text, over tokens, as a PNG or SVG.

    `marks` are steps worth a dotted line and a word, such as an interruption.
    """
    records = read_records(run / METRICS)
    tokens = [record["tokens"] / 1e6 for record in records]
    measured = [record for record in records if "validation_loss" in record]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(tokens, [record["loss"] for record in records], color=BLUE, linewidth=0.8, alpha=0.7, label="training")
    axes.plot(
        [record["tokens"] / 1e6 for record in measured],
        [record["validation_loss"] for record in measured],
        color=ORANGE,
        marker="o",
        markersize=4,
        label="held out",
    )
    at = {record["step"]: record["tokens"] / 1e6 for record in records}
    for step, word in (marks or {}).items():
        axes.axvline(at[step], color=GREY, linestyle=":", linewidth=1)
        axes.text(at[step], 0.97, f" {word}", transform=axes.get_xaxis_transform(), va="top", fontsize=8, color=GREY)
    axes.set(xlabel="million tokens", ylabel="loss (nats a token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out)
