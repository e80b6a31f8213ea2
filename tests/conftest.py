"""What several tests start from. Nothing here touches a network: the Hub is a mirror on this machine."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
import torch._dynamo  # by any optimizer: as well before the first freeze below
import type_checks  # noqa: F401  before smolforge, whose functions it wraps
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.checkpoint import loading
from smolforge.models.decoder import LanguageModel
from smolforge.testing import HubMirror, processes, sentences, tiny_config, tiny_model, tiny_tokenizer
from smolforge.tokenizer import Tokenizer
from smolforge.verification import checks

# huggingface_hub reads these when it is first imported, which must be after this.
SCRATCH = Path(tempfile.mkdtemp(prefix="smolforge-hub-"))
(SCRATCH / "mirror").mkdir()
MIRROR = HubMirror(SCRATCH / "mirror").__enter__()
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
os.environ.setdefault("TRACKIO_DIR", str(SCRATCH / "trackio"))  # a child imports this file as well
os.environ |= {"HF_ENDPOINT": MIRROR.url, "HF_HOME": str(SCRATCH / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ["HF_HUB_DISABLE_XET"] = "1"  # uploads go by LFS, which the mirror speaks
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

# What files begin with that have the work of a child.
processes.PRELOADED += [
    "pytest",
    "hypothesis.strategies",
    "jaxtyping",
    "huggingface_hub",
]

SHARED = Path(__file__).parents[2] / "shared" / "data"
RELEASED = Path(__file__).parents[1] / ".released/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The released SmolLM2-135M-Instruct as llama.cpp rounded it to 4 bits. `make .released` brings it."""
needs_released = pytest.mark.skipif(not RELEASED.is_file(), reason="the released weights are not here: make .released")

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


get_freeze_count = gc.get_freeze_count
_frozen_modules = 0


def pytest_configure() -> None:
    gc.disable()  # while tests are imported, which makes little garbage and much that is looked through


def pytest_unconfigure() -> None:
    MIRROR.__exit__()
    shutil.rmtree(SCRATCH, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest is begun first: at the end each worker has something short to take."""
    gc.enable()
    items.sort(key=lambda item: item.get_closest_marker("heavy") is None)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their place: those of a packed file change each second, and processes must agree on names."""
    return argname if isinstance(val, bytes) else None


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


@given(st.none())
def _draw_once(_):
    """Make Hypothesis' generator, whose holder it would not find among what is frozen."""


@pytest.fixture(autouse=True)
def _libraries_are_no_garbage():
    """Each run begins with a full collection, which took half of a short run's time, with all that was imported."""
    global _frozen_modules
    if len(sys.modules) > _frozen_modules:
        gc.collect()
        _draw_once()
        gc.freeze()
        count, _frozen_modules = get_freeze_count(), len(sys.modules)
        gc.get_freeze_count = lambda: count  # which runs ask for as well, and to count them takes as long


@pytest.fixture(autouse=True)
def _quiet_numbers():
    torch.manual_seed(0)


@pytest.fixture
def whole_checks() -> None:
    """Asked for by tests of what verify and exports check, which takes most of their time; see below."""


@pytest.fixture(autouse=True)
def _shorter_checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere models are compared over fewer tokens, and none is compiled to see whether its head is tied."""
    if "whole_checks" not in request.fixturenames:
        monkeypatch.setattr(checks, "GREEDY_TOKENS", 16)
        monkeypatch.setattr(checks, "_is_tied_compiled", lambda model: True)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def released() -> LanguageModel:
    """The released model, once for each process; tests leave it as it is."""
    return loading.load(RELEASED)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sentences(300))
    return path


@pytest.fixture(params=["int8", "int4", "q8_0"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model as a folder of integers, or a .gguf; both know how to chat."""
    from smolforge.checkpoint import huggingface
    from smolforge.exporters.gguf import to_gguf
    from smolforge.models.quantized import QuantizationScheme, quantize
    from smolforge.tokenizer.chat import CHATML

    model, folder = tiny_model(hidden_size=64, intermediate_size=96), tmp_path / "small"
    tokenizer = Tokenizer(model.tokenizer.backend, model.tokenizer.settings | {"chat_template": CHATML})
    if request.param != "q8_0":
        quantize(
            model, QuantizationScheme(4, 32, True) if request.param == "int4" else QuantizationScheme(8, None, True)
        )
    huggingface.save(model, folder, tokenizer)
    if request.param == "q8_0":
        to_gguf(folder, folder.with_suffix(".gguf"), "q8_0")
        return folder.with_suffix(".gguf")
    return folder


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real tokenizer and texts are not beside this checkout")
    return SHARED


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with a kind and the numbers of batches whose loss or gradient is to go wrong."""
    from smolforge.data.batches import TokenWindows
    from smolforge.training import loop

    real, numbers, bad = TokenWindows.batch, {}, {}

    def batch(windows, number, rows, share):
        found = real(windows, number, rows, share)
        numbers[found.input_ids.numpy().tobytes()] = number
        return found

    def backward(model, batch, *rest, **options):
        losses = computed(model, batch, *rest, **options)
        match bad.get(numbers[batch.input_ids.numpy().tobytes()]):
            case "loss":
                losses["loss"] = torch.tensor(float("nan"))
            case "gradient":
                next(model.parameters()).grad[0, 0] = float("inf")
            case "spike":
                losses["loss"] = losses["loss"] + 10
        return losses

    computed = loop.forward_backward
    monkeypatch.setattr(TokenWindows, "batch", batch)
    monkeypatch.setattr(loop, "forward_backward", backward)
    return lambda kind, *which: bad.update(dict.fromkeys(which, kind))
