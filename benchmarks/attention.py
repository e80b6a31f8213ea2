"""What it costs to keep documents in a row apart, and what memory grows with.

    python benchmarks/attention.py [--rounds 8] [--document 200] [--preset smollm2-135m]

Speed: forward and backward of one layer's attention, then of the whole model and its loss; contestants in turn on
the same numbers, so what counts is the ratio within a round. Memory: one whole layer, forward and backward, each
length in a fresh process (Linux only); what the pass adds at its peak to what the process had before.

On processors that others use too, GOMP_SPINCOUNT=0 lets threads sleep where they wait for each other.
"""

import argparse
import functools
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from smolforge.config import ModelConfig, presets
from smolforge.data.batches import Batch
from smolforge.models.attention import CausalAttention, DocumentAttention, document_ids, masked_attention
from smolforge.models.decoder import build
from smolforge.training.loop import forward_backward
from smolforge.training.objective import Objective

CAUSAL, DOCUMENTS, MASKED = "causal, whole rows", "documents", "documents by a mask"
SHAPES = ((4, 512), (1, 2048), (8, 2048))
STEP_ROWS, STEP_LENGTH = 1, 2048
LENGTHS = (1024, 2048, 4096, 8192)
SEPARATOR = 0

Contestants = dict[str, Callable[[], object]]


def texts(rows: int, length: int, mean: int) -> Tensor:
    """Ids (rows, length) of documents whose lengths are drawn from a quarter to seven quarters of the mean."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 256, (rows, length), generator=drawn)
    for row in ids:
        place = 0
        while (place := place + int(torch.randint(mean // 4, 2 * mean - mean // 4, (), generator=drawn))) < length:
            row[place] = SEPARATOR
    return ids


def attentions(config: ModelConfig, ids: Tensor) -> Contestants:
    """Forward and backward of one layer's attention, laid out as a layer's projections are."""
    packed, plain = DocumentAttention(document_ids(ids, SEPARATOR)), CausalAttention()
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(*ids.shape, n, config.resolved_head_dim).transpose(1, 2).requires_grad_() for n in heads)
    torch.testing.assert_close(packed.attend(0, q, k, v), masked_attention(packed.positions, q, k, v))
    return {
        CAUSAL: lambda: plain.attend(0, q, k, v).sum().backward(),
        DOCUMENTS: lambda: packed.attend(0, q, k, v).sum().backward(),
        MASKED: lambda: masked_attention(packed.positions, q, k, v).sum().backward(),
    }


def steps(config: ModelConfig, ids: Tensor) -> Contestants:
    """Forward and backward of the whole model."""
    model, batch = build(config), Batch(ids, ids.roll(-1, 1))
    return {
        CAUSAL: lambda: forward_backward(Objective(model), batch, ids.numel(), rows=len(ids)),
        DOCUMENTS: lambda: forward_backward(Objective(model, separator=SEPARATOR), batch, ids.numel(), rows=len(ids)),
    }


def race(contestants: Contestants, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, once in contestants.items():
            start = time.perf_counter()
            once()
            if turn:  # the first allocates
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(what: str, seconds: dict[str, list[float]]) -> None:
    for name, mine in seconds.items():
        ratios = [other / own for other, own in zip(seconds[CAUSAL], mine, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {what} | {name} | {1000 * statistics.median(mine):,.0f} | {ratio} |", flush=True)


def added_bytes(config: ModelConfig, name: str, length: int, mean: int, answer: Connection) -> None:
    """What one pass over a layer adds to this process at its peak."""
    model, ids = build(config), texts(1, length, mean)
    packed = DocumentAttention(document_ids(ids, SEPARATOR))
    if name == MASKED:
        packed.attend_documents = functools.partial(masked_attention, packed.positions)
    model.hidden_states(ids[:, :64]).sum().backward()  # gradients, and what libraries keep
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes the present
    before = highest_bytes()
    model.hidden_states(ids, packed.positions, CausalAttention() if name == CAUSAL else packed).sum().backward()
    answer.send(highest_bytes() - before)


def highest_bytes() -> int:
    """Most memory this process had resident."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def in_fresh_process(config: ModelConfig, name: str, length: int, mean: int) -> int:
    here, there = mp.Pipe()
    child = mp.get_context("spawn").Process(target=added_bytes, args=(config, name, length, mean, there))
    child.start()
    found = here.recv()
    child.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--document", type=int, default=200, help="mean tokens of a document")
    parser.add_argument("--preset", default="smollm2-135m")
    asked = parser.parse_args()
    config = ModelConfig.model_validate(presets.shape(asked.preset))
    print(f"{asked.preset}, documents of about {asked.document} tokens, fp32, {asked.rounds} rounds\n")
    print("| work | contestant | milliseconds | faster than causal by (range) |\n|---|---|---|---|")
    for rows, length in SHAPES:
        contestants = attentions(config, texts(rows, length, asked.document))
        report(f"attention, {rows} x {length}", race(contestants, asked.rounds))
    contestants = steps(config, texts(STEP_ROWS, STEP_LENGTH, asked.document))
    report(f"forward and backward, {STEP_ROWS} x {STEP_LENGTH}", race(contestants, asked.rounds))
    # A small vocabulary: the gradient of the embedding is not what is asked about.
    layer = config.model_copy(update={"num_hidden_layers": 1, "vocab_size": 256})
    print(f"\n| one layer, MB added by a row of | {' | '.join(map(str, LENGTHS))} |\n|---|{'---|' * len(LENGTHS)}")
    for name in (CAUSAL, DOCUMENTS, MASKED):
        found = [in_fresh_process(layer, name, length, asked.document) for length in LENGTHS]
        print(f"| {name} | {' | '.join(f'{each / 1e6:.0f}' for each in found)} |")


if __name__ == "__main__":
    main()
