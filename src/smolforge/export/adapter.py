"""What low-rank training learned -> a folder in peft's format, proven by merging it into its base again."""

import shutil
from pathlib import Path

import torch

from smolforge import commit
from smolforge.checkpoint import adapter, resolve
from smolforge.errors import InvalidFile, SettingError
from smolforge.tokenizer import FILES
from smolforge.verification import rows
from smolforge.verification.oracle import tolerance

CHECKED_TOKENS = 512


def to_adapter(model: str | Path, out: Path) -> tuple[dict[str, int], float]:
    """Write `out`; returns its files' sizes, and by how much logits differ from those of the model as it was saved.

    The folder appears only if its base, with the adapter added, says the same. Raises SettingError for a model that has
    no adapter or an `out` that has something in it, InvalidFile where the check does not hold.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"{out} is there already; name a new folder, or delete it first")
    source = resolve.find(model)
    if not adapter.is_adapter(source / adapter.FOLDER):
        raise SettingError(f"{model} has no adapter: it was not trained with --lora.rank")
    worst: list[float] = []

    def fill(folder: Path) -> None:
        for path in [*(source / adapter.FOLDER).iterdir(), *tokenizer_files(source)]:
            shutil.copyfile(path, folder / path.name)
        worst.append(difference(source, folder))

    commit.write_whole(out, fill)
    return {path.name: path.stat().st_size for path in sorted(out.iterdir())}, worst[0]


def tokenizer_files(source: Path) -> list[Path]:
    """Those of a folder, its chat template among them: tuning may have brought one that the base has not."""
    return [path for name in FILES if (path := source / name).is_file()]


@torch.inference_mode()
def difference(source: Path, folder: Path) -> float:
    """Largest difference of logits. Raises InvalidFile where it is more than rounding."""
    saved, merged = resolve.load(source), resolve.load(folder)
    row = rows(saved, min(CHECKED_TOKENS, saved.config.max_position_embeddings))[-1]
    ids = torch.tensor([row])
    wanted = saved(ids)
    worst = (merged(ids) - wanted).abs().max().item()
    if worst > tolerance(wanted.abs().max().item()):
        raise InvalidFile(f"{source}: its adapter on {adapter.base_of(folder)} differs from it by {worst:.1e}")
    return worst
