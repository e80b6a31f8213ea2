"""Who takes part, and where each lives."""

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Contestant:
    """`file` is its module here; `python` the interpreter of its environment, with `packages` that matter."""

    title: str
    file: str
    python: Path
    packages: tuple[str, ...]

    def command(self, verb: str, *given: str) -> list[str]:
        return [str(self.python), str(HERE / "run_contestant.py"), self.file, verb, *given]

    @property
    def module(self) -> ModuleType:
        """What it says of its folders; its own packages are imported only by what runs in its environment."""
        return import_module(f"contestants.{self.file}")

    def how(self) -> str:
        """How it is used, in a sentence, and its versions."""
        read = (
            "import json, sys; from importlib.metadata import version; print(json.dumps([*map(version, sys.argv[1:])]))"
        )
        said = subprocess.run([self.python, "-c", read, *self.packages], capture_output=True, text=True, check=True)
        versions = [f"{name} {each}" for name, each in zip(self.packages, json.loads(said.stdout), strict=True)]
        sentence = (self.module.__doc__ or "").split("\n\n")[0].strip().rstrip(".")
        return f"{sentence} ({', '.join(versions)})"


CONTESTANTS = {
    "smolforge": Contestant("smolforge", "ours", Path(sys.executable), ("smolforge", "torch")),
    "transformers": Contestant(
        "Transformers' Trainer", "trainer", Path(sys.executable), ("transformers", "accelerate", "torch")
    ),
    "plain": Contestant("plain loop, as nanoGPT's", "plain", Path(sys.executable), ("transformers", "torch")),
    "litgpt": Contestant("litgpt", "litgpt_", ROOT / ".litgpt" / "bin" / "python", ("litgpt", "lightning", "torch")),
}
