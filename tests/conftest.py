"""What several tests start from. Nothing here touches a network."""

from pathlib import Path

import pytest
import torch

from smolforge.testing import sentences, tiny_config, tiny_tokenizer
from smolforge.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"

NANO = {
    "seed": 3,
    "model": tiny_config().model_dump(),
    "optim": {
        "learning_rate": 3e-3,
        "schedule": {"warmup_steps": 2, "decay": "linear", "final_learning_rate": 3e-4},
    },
    "train": {
        "steps": 8,
        "sequence_length": 32,
        "batch_tokens": 128,
        "checkpoint_every": 4,
        "evaluate_every": 4,
        "sample_every": "none",
    },
}
"""A recipe that runs in a fraction of a second; give it data.sources."""


@pytest.fixture(autouse=True)
def _quiet_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sentences(300))
    return path


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real tokenizer and texts are not beside this checkout")
    return SHARED
