"""Whether the loader keeps up: the wait for data in a nano run on a mixture, and what a row costs.

    python benchmarks/mixing.py [--steps 30] [--sources 5] [--workers 1]

Sources are written, mixed in the shares of SmolLM1 in two stages, and the nano recipe trains on them; the wait is
`seconds_data` of its metrics over all seconds, summed over all steps. Beside it, in one process and in turn: how long
the order alone takes for a position, and rows of a mixture against rows of one corpus.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from smolforge.config import Data
from smolforge.data.batches import TokenWindows
from smolforge.data.corpus import TRAIN
from smolforge.data.mixture import Mixture, MixtureWindows
from smolforge.data.prepare.build import prepare
from smolforge.runs import resume_or_start
from smolforge.runs.mixture import order_of
from smolforge.testing import sentences
from smolforge.training.run_folder import read_records

SHARES = (0.70, 0.15, 0.08, 0.06, 0.01)
PARTS = ("data", "forward", "backward", "optimizer", "other")


def mixture(folder: Path, sources: int) -> dict[str, object]:
    """Dotted settings of so many sources in two stages."""
    text = sentences(20_000)
    names = [f"s{number}" for number in range(sources)]
    for name in names:
        (folder / f"{name}.txt").write_text(f"{name}\n{text}")
    settings: dict[str, object] = {f"data.mixture.{name}.source": str(folder / f"{name}.txt") for name in names}
    settings |= {f"data.mixture.{name}.weight": share for name, share in zip(names, SHARES, strict=False)}
    stages = [{"until_step": 0.5}, {"weights": dict.fromkeys(names, 1)}]
    return settings | {"data.stages": stages}


def microseconds(work: Callable[[int], object], count: int) -> float:
    begun = time.perf_counter()
    for number in range(count):
        work(number)
    return 1e6 * (time.perf_counter() - begun) / count


def main() -> None:
    """Train, read the metrics, time the rows, and print."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--steps", type=int, default=30)
    asked.add_argument("--sources", type=int, default=5, choices=range(1, 6))
    asked.add_argument("--workers", type=int, default=1)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plain = prepare(Data(sources=("python-docs",)), folder / "plain", None, max_tokens=2_000_000)
        plain.tokenizer().save(folder / "tokenizer")
        small = {"train.steps": given.steps, "train.evaluate_every": None, "train.sample_every": None}
        small |= {"tokenizer": str(folder / "tokenizer"), "data.num_workers": given.workers, "report.to": None}
        run = resume_or_start("nano", folder / "runs" / "a", mixture(folder, given.sources) | small)
        records = read_records(run.folder / "metrics.jsonl")
        waited = sum(record["seconds_data"] for record in records)
        whole = sum(record[f"seconds_{part}"] for record in records for part in PARTS)
        text, order = Mixture.open(run.folder), order_of(run.recipe)
        texts = {name: corpus.tokens(TRAIN) for name, corpus in text.sources.items()}
        rows = MixtureWindows(texts, order, 256, seed=0)
        alone = TokenWindows(plain.tokens(TRAIN), 256, 0)
        works = {
            "order alone": order.source_at,
            "row of a mixture": lambda n: rows.batch(n, 1),
            "row of one corpus": lambda n: alone.batch(n, 1),
        }
        found = {name: statistics.median(microseconds(work, 2000) for _ in range(5)) for name, work in works.items()}
    shown = {"wait_for_data": waited / whole, "steps": len(records), "seconds": whole}
    print(json.dumps(shown | {f"{name}, microseconds": round(value, 1) for name, value in found.items()}, indent=2))


if __name__ == "__main__":
    main()
