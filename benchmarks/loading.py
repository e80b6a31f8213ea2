"""Loading the full-size checkpoint: ours beside Transformers and beside reading the file.

    python benchmarks/loading.py [--rounds 5] [--preset smollm2-135m]

A checkpoint of the published shape with random bfloat16 weights is written first. Every load happens in a fresh
process with all imports done, one contestant after the other, the file in the page cache for all. Memory is what
the load added at its peak to what the process had before.
"""

import argparse
import multiprocessing as mp
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

READ, OURS, OURS_BF16 = "reading the file", "smolforge, fp32", "smolforge, bf16"
THEIRS, THEIRS_BF16 = "Transformers, fp32", "Transformers, bf16"


def loader(name: str, folder: Path) -> Callable[[], object]:
    """The load of a contestant, its imports done."""
    if name == READ:
        return lambda: (folder / "model.safetensors").read_bytes()
    import torch

    dtype = torch.bfloat16 if name in (OURS_BF16, THEIRS_BF16) else torch.float32
    if name in (OURS, OURS_BF16):
        from smolforge.checkpoint.loading import load

        return lambda: load(folder, dtype)
    from transformers import LlamaForCausalLM, logging

    logging.disable_progress_bar()
    return lambda: LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def measured(name: str, folder: Path, answer: Connection) -> None:
    """(seconds, added bytes at the peak) of one load."""
    load = loader(name, folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - start
    answer.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
    del loaded


def write(folder: Path, preset: str) -> int:
    """A checkpoint of a preset's shape; returns its size."""
    import torch

    from smolforge.checkpoint import huggingface
    from smolforge.config import ModelConfig, presets
    from smolforge.models.decoder import build

    huggingface.save(build(ModelConfig.model_validate(presets.shape(preset))), folder, dtype=torch.bfloat16)
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="smollm2-135m")
    asked = parser.parse_args()
    context = mp.get_context("spawn")
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in (READ, OURS, OURS_BF16, THEIRS, THEIRS_BF16)}
    with tempfile.TemporaryDirectory() as folder:
        writer = mp.get_context("spawn").Pool(1)
        size = writer.apply(write, (Path(folder), asked.preset))
        writer.close()
        for _ in range(asked.rounds):
            for name, results in found.items():
                here, there = context.Pipe()
                child = context.Process(target=measured, args=(name, Path(folder), there))
                child.start()
                results.append(here.recv())
                child.join()
    print(f"{asked.preset}: model.safetensors of {size / 1e6:,.0f} MB, {asked.rounds} rounds\n")
    print("| contestant | seconds (range) | times reading | added memory at the peak, MB |\n|---|---|---|---|")
    base = statistics.median(seconds for seconds, _ in found[READ])
    for name, results in found.items():
        seconds = [each for each, _ in results]
        middle, memory = statistics.median(seconds), statistics.median(each for _, each in results)
        spread = f"{middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"| {name} | {spread} | {middle / base:.1f} | {memory / 1e6:,.0f} |")


if __name__ == "__main__":
    main()
