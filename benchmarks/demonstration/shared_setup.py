"""The setup that all contestants share: one text, one tokenizer, one shape, one optimizer, the same initial weights.

SETUP/text/*.txt        a document each, to train on       SETUP/tokenizer/        trained on them
SETUP/held_out.txt      to measure on                      SETUP/model/            random weights
SETUP/setup.json       the settings below, and the hash of all text
"""

import hashlib
import json
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "sequence_length": 256,
    "rows": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "save_every": 20,
    "preset": "smollm2-nano",
    "dtype": "float32",
}
"""The rate stays where the warm-up takes it, since nobody knows how many steps fit into the clock; without weight decay
nobody's own choice of what decays counts. Saving is every so many steps for all."""
ENDLESS = 5000
"""Steps that no contestant reaches."""


def prepare(folder: Path) -> dict[str, Any]:
    """Write the shared setup, or reuse the one in the folder; return the content of setup.json."""
    if (folder / "setup.json").is_file():
        return json.loads((folder / "setup.json").read_text())
    from smolforge.data.prepare.documents import python_docs
    from smolforge.tokenizer import Tokenizer

    groups = sorted({document.group for document in python_docs()})
    held = {group for group in groups if hashlib.sha256(group.encode()).digest()[0] < 13}
    train = [document.text for document in python_docs() if document.group not in held]
    texts, held_out = folder / "text", "".join(each.text for each in python_docs() if each.group in held)
    texts.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(train):
        (texts / f"{number:05d}.txt").write_text(text, "utf-8")
    (folder / "held_out.txt").write_text(held_out, "utf-8")
    tokenizer = Tokenizer.train(iter(train), 4096)
    tokenizer.save(folder / "tokenizer")
    _weights(folder / "model", folder / "tokenizer")
    content = hashlib.sha256("\0".join([*train, held_out]).encode()).hexdigest()
    sizes = {"documents": len(train), "bytes": sum(len(text.encode()) for text in train)}
    found = {**SETTINGS, **sizes, "sha256": content, "held_out_bytes": len(held_out.encode())}
    (folder / "setup.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def _weights(folder: Path, tokenizer: Path) -> None:
    """What every run begins from, in the form that all can read."""
    import shutil

    from smolforge.checkpoint import huggingface
    from smolforge.config import ModelConfig, presets
    from smolforge.models.decoder import build

    huggingface.save(build(ModelConfig.model_validate(presets.shape(SETTINGS["preset"]))), folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "setup.json").read_text())
