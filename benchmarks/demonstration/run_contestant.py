"""One contestant in its own environment, told what to do.

PYTHON run_contestant.py NAME prepare SETUP
PYTHON run_contestant.py NAME train SETUP OUT SEED     start or resume by its own means, until it is killed
PYTHON run_contestant.py NAME export OUT FOLDER         STEP.safetensors of each checkpoint, under Hugging Face's names
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))


def main() -> None:
    name, verb, *given = sys.argv[1:]
    contestant = import_module(f"contestants.{name}")
    paths = [Path(each) for each in given[:2]]
    match verb:
        case "prepare":
            contestant.prepare(*paths)
        case "train":
            contestant.train(*paths, int(given[2]))
        case "export":
            export(contestant, *paths)


def export(contestant: ModuleType, out: Path, folder: Path) -> None:
    """A checkpoint that was being written when the kill came may not be readable; it is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for step, file in contestant.checkpoints(out).items():
        try:
            contestant.export(file, folder / f"{step}.safetensors")
        except Exception as error:
            print(f"{file}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
