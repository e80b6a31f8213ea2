"""Same text, same shape, same clock: smolforge beside other trainers, uninterrupted and with random kills.

    python benchmarks/demonstration/demonstrate.py OUT [--seconds 120] [--seeds 3] [--contestants NAME ...]

Each contestant trains for the same wall-clock time from the same weights, once uninterrupted and once killed at random
moments (30 s apart in the mean), each time started again by its own resume. What was done stays in OUT, and the same
command goes on there. OUT/demonstration.md is the table, OUT/demonstration.svg the figure, OUT/demonstration.json all
numbers. The contestants' settings are in OUT/shared_setup/setup.json, and what they do with them in contestants/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import kill_runs
import measure
import page
import shared_setup
from contestants import CONTESTANTS
from rich.console import Console

KINDS = ("uninterrupted", "with_kills")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    asked = parser.parse_args()
    asked.out, seeds = asked.out.resolve(), list(range(asked.seeds))
    kept = asked.out / "demonstration.json"
    if kept.is_file() and (begun := json.loads(kept.read_text())["seconds"]) != asked.seconds:
        raise SystemExit(f"{asked.out} was begun with {begun:g} s a run; give another folder, or --seconds {begun:g}")
    common = shared_setup.prepare(asked.out / "shared_setup")
    names = [name for name in asked.contestants if present(name, asked.out / "shared_setup")]
    absent = [name for name in asked.contestants if name not in names]
    used = {name: CONTESTANTS[name].how() for name in names}
    found: dict[str, dict[int, Any]] = {name: {} for name in names}
    numbers = {"seconds": asked.seconds, "setup": common, "machine": page.machine(), "used": used}
    numbers |= {"absent": absent, "found": found}
    if not kept.is_file():  # so that another length is refused from the first run on
        kept.write_text(json.dumps(numbers) + "\n")
    said = ""
    for seed in seeds:
        for name in names:
            found[name][seed] = one(name, seed, asked)
        kept.write_text(json.dumps(numbers) + "\n")
        said = page.write(asked.out)  # after each seed, for who cannot wait for all
    print(said)


def present(name: str, folder: Path) -> bool:
    """Whether it is installed, and has prepared the text in its own way, off the clock."""
    contestant, done = CONTESTANTS[name], folder / "prepared" / f"{name}.done"
    if not contestant.python.is_file():
        return False
    if not done.is_file():
        command = contestant.command("prepare", str(folder))
        tried = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        if tried.returncode:
            raise SystemExit(f"{contestant.title} could not prepare its text: {tried.stderr.strip().splitlines()[-1]}")
        done.touch()
    return True


def one(name: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Both runs of one contestant with one seed, and what is measured of them."""
    console, folder = Console(stderr=True), asked.out / "shared_setup"
    outs = {kind: asked.out / f"{name}-{seed}-{kind}" for kind in KINDS}
    seen = {}
    for kind in KINDS:
        console.print(f"{CONTESTANTS[name].title}, seed {seed}, {kind}: {asked.seconds:g} s")
        seen[kind] = kill_runs.run(name, folder, outs[kind], seed, asked.seconds, kind == "with_kills")
    found = measure.summary(name, folder, outs, seen, page.marks(asked.seconds))
    found["notices_a_flipped_bit"] = measure.notices_a_flipped_bit(name, folder, outs["with_kills"], seed)
    return found


if __name__ == "__main__":
    main()
