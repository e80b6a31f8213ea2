"""What several tests start from. Nothing here touches a network: the Hub is a mirror on this machine."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

from smolforge.testing import HubMirror, sentences, tiny_config, tiny_tokenizer
from smolforge.tokenizer import Tokenizer

# huggingface_hub reads these when it is first imported, which must be after this.
SCRATCH = Path(tempfile.mkdtemp(prefix="smolforge-hub-"))
(SCRATCH / "mirror").mkdir()
MIRROR = HubMirror(SCRATCH / "mirror").__enter__()
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
os.environ.setdefault("TRACKIO_DIR", str(SCRATCH / "trackio"))  # a child imports this file as well
os.environ |= {"HF_ENDPOINT": MIRROR.url, "HF_HOME": str(SCRATCH / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

SHARED = Path(__file__).parents[2] / "shared" / "data"

# No deadline: other programs may be busy. What must pass each time tries the same examples each time;
# `make test-long` looks for new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None)
settings.load_profile("same")

NANO = {
    "seed": 3,
    "model": tiny_config().model_dump(exclude_none=True),
    "optim": {
        "learning_rate": 3e-3,
        "schedule": {"warmup_steps": 2, "decay": "linear", "final_learning_rate": 3e-4},
    },
    "train": {
        "steps": 8,
        "sequence_length": 32,
        "batch_tokens": 128,
        "dtype": "float32",
        "checkpoint_every": 4,
        "evaluate_every": 4,
        "sample_every": "none",
    },
    "report": {"to": "none"},
}
"""A recipe that runs in a fraction of a second; give it data.sources."""


def pytest_unconfigure() -> None:
    MIRROR.__exit__()
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubMirror]:
    """An empty Hub and an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    assert MIRROR.url == constants.ENDPOINT
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    MIRROR.clear()
    yield MIRROR
    MIRROR.clear()
    close_session()


@pytest.fixture
def compiling() -> Iterator[None]:
    """torch.compile and the wrappers that check shapes do not go together."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with a kind and the numbers of batches whose loss or gradient is to go wrong."""
    from smolforge import training
    from smolforge.data.batches import Windows

    real, numbers, bad = Windows.batch, {}, {}

    def batch(windows, number, rows, share):
        found = real(windows, number, rows, share)
        numbers[found.ids.numpy().tobytes()] = number
        return found

    def backward(model, batch, *rest):
        losses = computed(model, batch, *rest)
        match bad.get(numbers[batch.ids.numpy().tobytes()]):
            case "loss":
                losses["loss"] = torch.tensor(float("nan"))
            case "gradient":
                next(model.parameters()).grad[0, 0] = float("inf")
            case "spike":
                losses["loss"] = losses["loss"] + 10
        return losses

    computed = training.backward
    monkeypatch.setattr(Windows, "batch", batch)
    monkeypatch.setattr(training, "backward", backward)
    return lambda kind, *which: bad.update(dict.fromkeys(which, kind))
