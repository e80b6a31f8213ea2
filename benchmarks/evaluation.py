"""Scoring multiple-choice items: ours beside lm-evaluation-harness with its own Hugging Face model.

    python benchmarks/evaluation.py ITEMS.jsonl --tokenizer FOLDER [--preset smollm2-135m] [--items 16] [--rounds 3]

The same weights (random, of a preset's shape), the same items, fp32, in one process in turn; each round takes the next
items. Both are given texts and give log-probabilities, so encoding counts for both. The harness takes the batch size
that is its fastest of those tried on other items beforehand; ours has its default. Seconds are the processor's, all
threads together, which other work on the machine hardly lengthens; seconds of the clock stand beside them.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from smolforge.checkpoint import huggingface, loading
from smolforge.config import ModelConfig, presets
from smolforge.evaluation.multiple_choice import DELIMITER, Item, score
from smolforge.evaluation.tasks import read_items
from smolforge.models.decoder import build
from smolforge.tokenizer import Tokenizer

BATCH_SIZES = (1, 8, 16)
Scorer = Callable[[Sequence[Item]], list[float]]


def ours(folder: Path) -> Scorer:
    model = loading.load(folder)
    return lambda items: [value for found in score(model, items) for value in found.logprobs]


def harness(folder: Path) -> Callable[[int], Scorer]:
    """Its HFLM, by batch size."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)

    def scored(items: Sequence[Item]) -> list[float]:
        pairs = [(query, DELIMITER + choice) for item in items for query, choice in item.pairs()]
        asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
        return [logprob for logprob, _ in model.loglikelihood(asked, disable_tqdm=True)]

    def with_batch(size: int) -> Scorer:
        model.batch_size_per_gpu = size
        return scored

    return with_batch


def timed(scorer: Scorer, items: Sequence[Item]) -> tuple[float, float, list[float]]:
    """Seconds of the processor, of the clock, and what was found."""
    busy, begun = time.process_time(), time.perf_counter()
    found = scorer(items)
    return time.process_time() - busy, time.perf_counter() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items_file", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    items = read_items(asked.items_file)
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.model_validate(presets.shape(asked.preset))
        huggingface.save(build(config), Path(folder), Tokenizer.load(asked.tokenizer))
        native, theirs = ours(Path(folder)), harness(Path(folder))
    warm, rest = items[: asked.items], items[asked.items :]
    native(warm[:2])
    best = min(BATCH_SIZES, key=lambda size: timed(theirs(size), warm)[0])
    ratios, by_clock, furthest = [], [], 0.0
    for number in range(asked.rounds):
        batch = rest[number * asked.items : (number + 1) * asked.items]
        busy, waited, found = timed(native, batch)
        busy_there, waited_there, expected = timed(theirs(best), batch)
        furthest = max(furthest, *(abs(a - b) for a, b in zip(found, expected, strict=True)))
        ratios.append(busy_there / busy)
        by_clock.append(waited_there / waited)
        print(f"round {number + 1}: {busy:.1f} s, harness {busy_there:.1f} s", flush=True)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, by the clock {statistics.median(by_clock):.2f}"
    print(
        f"{asked.items_file.stem}: {statistics.median(ratios):.2f} times the harness ({spread}), {asked.rounds} rounds "
        f"of {asked.items} items, {torch.get_num_threads()} threads, its batch size {best}; log-probabilities within "
        f"{furthest:.1e}"
    )


if __name__ == "__main__":
    main()
