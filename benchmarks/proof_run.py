"""The customary proof: 5000 steps of 4 x 512 tokens, a stop, 50 more, equal to a run that never stopped.

    python benchmarks/proof_run.py --out DIR --data.sources TEXT --tokenizer FOLDER
                                   [--steps 5000] [--more 50] [--recipe shakespeare] [--against transformers golden]

Everything is done by the command line, as a person would do it; settings of the recipe are given to all its runs.

    DIR/stopped     train: half-way a SIGTERM, which saves and ends it with 75, and the same command again
                    5000 steps: verify            50 more: verify
    DIR/through     train: 5050 steps at once, by what `auto` came to in the other
    DIR/results     proof.log: all that was said, hashes.json: what came out, metrics.jsonl and loss.svg: the curve

Equal means: weights, moments and random states of the last checkpoints by sha256, loss and gradient norm of every step
to the bit; on a GPU, if its kernels repeat themselves, which benchmarks/gpu.py asks. The schedule is that of 5050 steps
in both, so that it does not fall where a run happens to stop. Where something differs, or a check of verify does not
hold, the exit code is 1 and hashes.json says how far apart the losses are.

The runs see 20.7 million tokens: minutes on a GPU, a day or two on two cores. The same command goes on where it was
interrupted. `--recipe nano --steps 300`, without a text and a tokenizer, shows the same in minutes.

A machine without a network needs what benchmarks/gpu.py says, the wheels of cyclopts and docstring-parser, Rich, Jinja2
and matplotlib, and Transformers for verify.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from smolforge.checkpoint import training_state
from smolforge.comparison.figures import draw_loss_curve
from smolforge.training import environment
from smolforge.training.run_folder import METRICS, RECIPE, read_records

FILES = ("model.safetensors", "training/optimizer.safetensors", "training/random.safetensors")
NUMBERS = ("step", "tokens", "loss", "grad_norm", "learning_rate")
DECIDED = ("dtype", "micro_batch_size", "compile")
"""Settings of train that `auto` decides by measuring."""
STOPPED = 75


class Proof:
    """The command line, and what it said, in DIR/results."""

    def __init__(self, asked: argparse.Namespace, settings: list[str]) -> None:
        self.asked, self.end = asked, asked.steps + asked.more
        self.results = asked.out / "results"
        self.results.mkdir(parents=True, exist_ok=True)
        horizon = ["--optim.schedule.steps", str(self.end)]
        self.recipe = [asked.recipe, *settings, *horizon]
        self.failed: list[str] = []

    def say(self, line: str) -> None:
        print(line, flush=True)
        with (self.results / "proof.log").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def train(self, run: Path, steps: int, decided: list[str], until: int | None = None) -> None:
        """Go on to so many steps, unless an earlier try came there; a SIGTERM is sent after step `until`."""
        if saved_step(run) >= steps or (until and last_step(run) >= until):
            return
        words = ["train", *self.recipe, *decided, "--run", str(run), "--train.steps", str(steps)]
        code = self.smolforge(words, lambda: until is not None and last_step(run) >= until)
        if code not in ((0, STOPPED) if until else (0,)):
            sys.exit(f"training ended with {code}; {self.results / 'proof.log'} says why")

    def verify(self, run: Path) -> None:
        step = saved_step(run)
        words = ["verify", str(run), "--out", str(self.results / f"verify-{step}.json")]
        for oracle in self.asked.against:
            words += ["--against", oracle]
        if self.smolforge(words):
            self.failed.append(f"verify of step {step}")

    def smolforge(self, words: list[str], enough: Callable[[], bool] = lambda: False) -> int:
        """Run a command, with a SIGTERM once it is `enough`; returns its exit code."""
        self.say(f"$ smolforge {shlex.join(words)}")
        begun = time.monotonic()
        with (self.results / "proof.log").open("ab") as log:
            child = start(words, log)
            try:
                while child.poll() is None and not enough():
                    time.sleep(0.05)
                child.terminate()  # one that has ended hears nothing
            finally:
                code = child.wait()
        self.say(f"-> {code} after {time.monotonic() - begun:,.0f} s")
        return code

    def prove(self) -> bool:
        """All of it; writes hashes.json, metrics.jsonl and loss.svg."""
        stopped, through = (self.asked.out / name for name in ("stopped", "through"))
        self.train(stopped, self.asked.steps, [], until=max(1, self.asked.steps // 2))
        self.train(stopped, self.asked.steps, [])
        if saved_step(stopped) == self.asked.steps:
            self.verify(stopped)
        self.train(stopped, self.end, [])
        self.verify(stopped)
        self.train(through, self.end, decided(stopped))
        found = compared(stopped, through, self.end)
        starts = environment.starts(stopped)
        found |= {"stops": [start["step"] for start in starts[1:]], "failed": self.failed, "environment": starts[-1]}
        (self.results / "hashes.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        shutil.copy(stopped / METRICS, self.results / METRICS)
        title = f"{Path(self.asked.recipe).stem}, {self.end} steps"
        draw_loss_curve(stopped, self.results / "loss.svg", title)
        for line in report(found):
            self.say(line)
        return found["equal"] and not self.failed


def start(words: list[str], log: BinaryIO) -> subprocess.Popen:
    """The command line, in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "smolforge", *words], stdout=log, stderr=log)


def saved_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max(map(training_state.step_from_dir, training_state.list_checkpoints(run)), default=0)


def last_step(run: Path) -> int:
    """The step of the last whole line of metrics; 0 where there is none."""
    path = run / METRICS
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def decided(run: Path) -> list[str]:
    """What `auto` came to in a run, as flags for another."""
    train = tomllib.loads((run / RECIPE).read_text("utf-8"))["train"]
    flags = [(f"--train.{name.replace('_', '-')}", str(train[name]).lower()) for name in DECIDED]
    return [word for flag in flags for word in flag]


def compared(stopped: Path, through: Path, end: int) -> dict[str, Any]:
    """Whether two runs came to the same end on the same way."""
    runs = {"stopped": stopped, "through": through}
    hashes = {
        name: {file: sha256(run / "checkpoints" / f"step-{end:08d}" / file) for file in FILES}
        for name, run in runs.items()
    }
    ours, theirs = ([[step[name] for name in NUMBERS] for step in read_records(run / METRICS)] for run in runs.values())
    different = [mine[0] for mine, other in zip(ours, theirs, strict=False) if mine != other]
    place = NUMBERS.index("loss")
    apart = [abs(mine[place] - other[place]) / other[place] for mine, other in zip(ours, theirs, strict=False)]
    return {
        "equal": hashes["stopped"] == hashes["through"] and ours == theirs and len(ours) == end,
        "steps": [len(ours), len(theirs)],
        "steps_that_differ": len(different),
        "first_that_differs": min(different, default=None),
        "largest_relative_difference_of_losses": max(apart),
        "last_loss": ours[-1][place],
        "sha256": hashes,
    }


def report(found: dict[str, Any]) -> list[str]:
    """The outcome, as lines."""
    stops = ", ".join(map(str, found["stops"]))
    lines = [f"stopped at steps {stops}; the loss of the last step is {found['last_loss']:.4f}"]
    for file in FILES:
        first, second = (found["sha256"][run][file] for run in ("stopped", "through"))
        lines += [f"{first}  {file}"] if first == second else [f"{first} is not {second}  {file}"]
    lines += [f"does not hold: {what}" for what in found["failed"]]
    if found["equal"]:
        return [*lines, f"equal to the bit: weights, moments, random states, and {found['steps'][0]} losses"]
    most = found["largest_relative_difference_of_losses"]
    return [*lines, f"NOT equal: {found['steps_that_differ']} steps differ, their losses by up to {most:.1e}"]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--more", type=int, default=50)
    parser.add_argument("--recipe", default="shakespeare")
    parser.add_argument("--against", nargs="*", default=[], help="what verify holds the model to, by default all")
    asked, settings = parser.parse_known_args()
    if not Proof(asked, settings).prove():
        sys.exit(1)


if __name__ == "__main__":
    main()
