"""What a person waits for who has nothing yet: from a clone to a sample of a model of one's own, and from then on.

    python benchmarks/firsts.py [--text FILE-OR-FOLDER] [--budget 1m] [--rounds 5]

Everything is typed as README says it, in a clone of this repository and in an environment made there, so it takes pip
and what pip can reach. Seconds are those of a clock; the machine must be quiet.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROMPT = ("--prompt", "The", "--max-new-tokens", "40")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="to train on; by default the documentation of smolforge")
    parser.add_argument("--budget", default="1m", help="of the training")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        clone, smolforge = Path(scratch, "smolforge"), Path(scratch, "smolforge", ".venv", "bin", "smolforge")
        text = str(asked.text.resolve() if asked.text else clone / "docs")
        run = ("--run", "runs/mine", "--data.sources", text)
        print(f"help: {several(asked.rounds, lambda: seconds(sys.executable, '-m', 'smolforge', '--help', at=ROOT))}")
        parts = {
            "clone": seconds("git", "clone", "--quiet", str(ROOT), str(clone), at=Path(scratch)),
            "install": seconds("make", f"PYTHON={sys.executable}", ".venv/.base", at=clone),
            f"train for {asked.budget}": seconds(smolforge, "train", "nano", *run, "--budget", asked.budget, at=clone),
            "sample": seconds(smolforge, "generate", "runs/mine", *PROMPT, at=clone),
        }
        print(f"base install: {size(clone / '.venv'):,.0f} MiB, of which torch {torch_size(clone):,.0f}")
        told = ", ".join(f"{part} {each:.1f}" for part, each in parts.items())
        print(f"clone to first own sample: {sum(parts.values()):.0f} s ({told})")
        print(f"Enter to first token: {several(asked.rounds, lambda: to_first_word(smolforge, clone))}")
        steps = json.loads((clone / "runs/mine/metrics.jsonl").read_text().splitlines()[-1])["step"]
        longer = (*run, "--train.steps", str(100 * steps))
        print(f"restart to first step: {several(asked.rounds, lambda: to_first_step(smolforge, clone, longer))}")


def seconds(*command: object, at: Path) -> float:
    """A command from Enter to its end; where it fails, what it said."""
    begun = time.perf_counter()
    done = subprocess.run([str(each) for each in command], cwd=at, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {done.stderr.strip()[-1000:]}")
    return time.perf_counter() - begun


def several(rounds: int, one: Callable[[], float]) -> str:
    found = [one() for _ in range(rounds)]
    return f"{statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})"


def size(folder: Path) -> float:
    """MiB of all files."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file()) / MIB


def torch_size(clone: Path) -> float:
    return sum(size(folder) for folder in clone.glob(".venv/lib/*/site-packages/torch"))


def to_first_word(smolforge: Path, at: Path) -> float:
    """From Enter to the first bytes behind the prompt."""
    begun, read = time.perf_counter(), b""
    with subprocess.Popen([smolforge, "generate", "runs/mine", *PROMPT], cwd=at, stdout=subprocess.PIPE) as child:
        assert child.stdout
        while len(read) <= len(PROMPT[1]):
            if not (more := os.read(child.stdout.fileno(), 1)):
                raise SystemExit("generate ended before its first token")
            read += more
        found = time.perf_counter() - begun
        child.kill()
    return found


def to_first_step(smolforge: Path, at: Path, settings: Sequence[str]) -> float:
    """From Enter to the next line of metrics of a run that was there already; it is killed then."""
    metrics = at / "runs/mine/metrics.jsonl"
    before, begun = metrics.stat().st_size, time.perf_counter()
    command = [smolforge, "train", "nano", *settings]
    with subprocess.Popen(command, cwd=at, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        while metrics.stat().st_size <= before:
            if child.poll() is not None:
                raise SystemExit(f"train ended: {child.communicate()[1].strip()[-1000:]}")
            before = min(before, metrics.stat().st_size)  # lines after the checkpoint are taken back
            time.sleep(0.005)
        found = time.perf_counter() - begun
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL)
    return found


if __name__ == "__main__":
    main()
