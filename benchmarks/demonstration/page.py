"""The table and the figure of a demonstration, from its numbers alone.

python benchmarks/demonstration/page.py OUT
"""

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from contestants import CONTESTANTS
from kill_runs import MEAN_SECONDS
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from smolforge.comparison import style

PAGE = Path(__file__).with_name("page.md").read_text("utf-8")
LINES = {"uninterrupted": style.SOLID, "with_kills": style.DASHES[-1]}


def marks(seconds: float) -> list[float]:
    """The moments to compare at."""
    return [each for each in (30.0, 60.0, 120.0, 300.0) if each < seconds] + [seconds]


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch

    from smolforge.device import device_name

    return {"cpu": device_name(torch.device("cpu")), "cores": os.cpu_count()}


def write(out: Path) -> str:
    """OUT/demonstration.md and .svg; returns what a terminal shows."""
    numbers = json.loads((out / "demonstration.json").read_text())
    (out / "demonstration.md").write_text(page(numbers))
    style.draw_all({"demonstration": lambda: draw(numbers)}, out)
    return f"{table(numbers)}\n\n{conditions(numbers)}\n\n{used(numbers)}"


def page(numbers: Mapping[str, Any]) -> str:
    """page.md, filled."""
    return PAGE.format(table=table(numbers), conditions=conditions(numbers), used=used(numbers))


def table(numbers: Mapping[str, Any]) -> str:
    """A column for each contestant, a line for each thing that was measured."""
    found = {name: list(seeds.values()) for name, seeds in numbers["found"].items()}
    lines = [("", *(CONTESTANTS[name].title for name in found)), ("---",) * (len(found) + 1)]
    for what, cell in columns(marks(numbers["seconds"])).items():
        lines.append((what, *(cell(seeds) for seeds in found.values())))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(at: Sequence[float]) -> dict[str, Callable[[Sequence[Mapping[str, Any]]], str]]:
    """What is said of the seeds of one contestant."""
    moments = ", ".join(f"{each:g}" for each in at)
    return {
        f"bits per byte uninterrupted, at {moments} s": lambda seeds: bits(seeds, "uninterrupted", at),
        f"bits per byte with random kills, at {moments} s": lambda seeds: bits(seeds, "with_kills", at),
        "weights as if never killed": lambda seeds: said([one["same_weights"] for one in seeds]),
        "sequences seen twice; never seen": rows,
        "a flipped bit in the last checkpoint is noticed": lambda seeds: said(
            [one["notices_a_flipped_bit"] for one in seeds]
        ),
        "checkpoints deleted by hand to go on": lambda seeds: str(sum(one["helped"] for one in seeds)),
        "restart to next step": lambda seeds: spread(known(seeds, "restart_seconds"), "{:.1f} s".format),
        "start to first step": lambda seeds: spread(known(seeds, "first_step_seconds"), "{:.1f} s".format),
        "tokens per second": lambda seeds: spread(known(seeds, "tokens_per_second"), "{:,.0f}".format),
        "peak memory": lambda seeds: spread([one["peak_bytes"] / 2**20 for one in seeds], "{:,.0f} MiB".format),
    }


def conditions(numbers: Mapping[str, Any]) -> str:
    """What all had in common."""
    count, common = max((len(each) for each in numbers["found"].values()), default=0), numbers["setup"]
    seeds = "1 seed" if count == 1 else f"{count} seeds, medians (range)"
    return (
        f"{seeds}; {numbers['seconds']:g} s each by the clock from the first start; kills {MEAN_SECONDS} s apart in "
        f"the mean. {common['bytes']:,} bytes of text (sha256 {common['sha256'][:12]}), {common['held_out_bytes']:,} "
        f"held out; shape {common['preset']}; AdamW {common['learning_rate']:g} after {common['warmup_steps']} steps, "
        f"{common['rows']} x {common['sequence_length']} tokens per step, {common['dtype']}, saved every "
        f"{common['save_every']} steps. {numbers['machine']['cores']} cores, {numbers['machine']['cpu']}."
    )


def used(numbers: Mapping[str, Any]) -> str:
    """How each was used, with its versions; who was not there."""
    lines = [f"- {how}" for how in numbers["used"].values()]
    return "\n".join(lines + [f"- {CONTESTANTS[name].title}: not installed here" for name in numbers["absent"]])


def rows(seeds: Sequence[Mapping[str, Any]]) -> str:
    repeated, skipped, of = (sum(one["rows"][number] for one in seeds) for number in range(3))
    return f"{repeated:,}; {skipped:,} of {of:,}"


def known(seeds: Sequence[Mapping[str, Any]], column: str) -> list[float]:
    """What was seen: a run that came to no step has no speed."""
    return [one[column] for one in seeds if one[column] is not None]


def bits(seeds: Sequence[Mapping[str, Any]], kind: str, at: Sequence[float]) -> str:
    found = [[one["bits_per_byte"][kind][f"{mark:g}"] for one in seeds] for mark in at]
    return ", ".join(f"{statistics.median(each):.2f}" if None not in each else "none" for each in found)


def spread(values: Sequence[float], write: Callable[[float], str]) -> str:
    if not values:
        return "never"
    middle = write(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({write(min(values))} to {write(max(values))})"


def said(answers: Sequence[bool | None]) -> str:
    """yes or no where all seeds agree."""
    words = ["not seen" if each is None else "yes" if each else "no" for each in answers]
    return words[0] if len(set(words)) == 1 else f"{words.count('yes')} of {len(words)}"


def draw(numbers: Mapping[str, Any]) -> Figure:
    """Bits per byte over tokens, where what is exact lies together, and over seconds, where what is fast goes ahead."""
    figure, key = style.new_figure(), list[tuple[str, Artist]]()
    tokens = numbers["setup"]["rows"] * numbers["setup"]["sequence_length"]
    left, right = figure.subplots(1, 2, sharey=True)
    for look, (name, seeds) in zip(style.line_styles(len(numbers["found"])), numbers["found"].items(), strict=True):
        for one in seeds.values():
            line = curves(left, one, look.color, lambda point: point[0] * tokens / 1e6)
        curves(right, [*seeds.values()][-1], look.color, lambda point: point[1])
        key.append((CONTESTANTS[name].title, line))
    for at in [*next(iter(numbers["found"].values())).values()][-1]["killed"]:
        right.axvline(at, color=style.RULE, linewidth=0.8, zorder=0)
    key.append(("killed at the grey lines", Line2D([], [], color=style.INK, linestyle=style.DASHES[-1])))
    style.finish_axes(left, xlabel="million tokens, all seeds", ylabel="bits per byte, validation text")
    style.finish_axes(right, key, xlabel="seconds since the first start, last seed", xlim=(0, numbers["seconds"]))
    return figure


def curves(axes: Axes, one: Mapping[str, Any], color: str, across: Callable[[Sequence[Any]], float]) -> Artist:
    """Plot every checkpoint, uninterrupted and with kills; `across` gives a point's x. Return the first line."""
    for kind, dashes in LINES.items():
        found = one["points"][kind]
        axes.plot([*map(across, found)], [point[2] for point in found], color=color, linestyle=dashes, linewidth=1.1)
    return axes.lines[-len(LINES)]


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
