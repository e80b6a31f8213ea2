"""A training step of ours beside one of Transformers: same weights, same batch, same optimizer, one machine.

    python benchmarks/training.py [--rounds 5] [--length 512] [--rows 4] [--preset smollm2-135m] [--compiled]

Each contestant lives in a process of its own, so that peak memory is its own; one step of each is run in
turn, so that a busy machine hits all alike. What counts is the ratio within a round. The losses must agree.
"""

import argparse
import json
import multiprocessing as mp
import resource
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

OURS, EAGER, COMPILED = "smolforge", "transformers eager", "transformers compiled"


def smolforge_step(config: dict[str, Any], ids: Any, labels: Any) -> Any:
    import torch

    from smolforge.config import ModelConfig, Optim
    from smolforge.data.batches import Batch
    from smolforge.model import build
    from smolforge.objective import Objective
    from smolforge.optim import optimizers
    from smolforge.training import backward

    model = build(ModelConfig.model_validate(config))
    (adamw,) = optimizers(model, Optim())
    objective = Objective(model)

    def step() -> float:
        losses = backward(objective, Batch(ids, labels), labels.numel(), len(ids))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        model.zero_grad(set_to_none=True)
        return losses["loss"].item()

    return step


def transformers_step(config: dict[str, Any], ids: Any, labels: Any, compiled: bool) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from smolforge.config import ModelConfig
    from smolforge.model import build

    names = {key: value for key, value in config.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**names))
    model.load_state_dict(build(ModelConfig.model_validate(config)).state_dict(), strict=False)
    model.tie_weights()
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        loss = forward(input_ids=ids, labels=ids, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step


def contestant(name: str, config: dict[str, Any], rows: int, length: int, pipe: Connection) -> None:
    """Run one step whenever asked; answer with its seconds and loss, at the end with peak memory."""
    import torch

    pick = torch.Generator().manual_seed(0)
    text = torch.randint(config["vocab_size"], (rows, length + 1), generator=pick)
    ids, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    if name == OURS:
        step = smolforge_step(config, ids, labels)
    else:
        step = transformers_step(config, ids, labels, name == COMPILED)
    while pipe.recv():
        begun = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - begun, loss))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def race(names: list[str], config: dict[str, Any], rows: int, length: int, rounds: int) -> list[dict[str, Any]]:
    context, pipes = mp.get_context("spawn"), {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=contestant, args=(name, config, rows, length, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names:
            pipes[name].send(True)
            taken, loss = pipes[name].recv()
            losses[name].append(loss)
            if turn:  # the first step allocates, and compiles
                seconds[name].append(taken)
    for name in names:
        worst = max(abs(a - b) / b for a, b in zip(losses[name], losses[names[0]], strict=True))
        assert worst < 1e-4, f"{name} does another training: its loss is {worst:.1e} off"
    table = []
    for name in names:
        pipes[name].send(False)
        ratios = [other / mine for mine, other in zip(seconds[OURS], seconds[name], strict=True)]
        table.append(
            {
                "contestant": name,
                "tokens_per_second": rows * length / statistics.median(seconds[name]),
                "ours_is_faster_by": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "peak_gib": pipes[name].recv() / 2**30,
            }
        )
    return table


def main() -> None:
    from smolforge import presets
    from smolforge.config import ModelConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also Transformers with torch.compile")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    config = ModelConfig.model_validate(presets.shape(chosen.preset)).model_dump()
    names = [OURS, EAGER, *([COMPILED] if chosen.compiled else [])]
    table = race(names, config, chosen.rows, chosen.length, chosen.rounds)
    if chosen.json:
        print(json.dumps(table))
        return
    print(f"{chosen.preset}, {chosen.rows} x {chosen.length} tokens, fp32, {chosen.rounds} rounds\n")
    print("| contestant | tokens/s | ours is faster by (range) | peak memory |\n|---|---|---|---|")
    for row in table:
        low, high = row["ratio_range"]
        ratio = f"{row['ours_is_faster_by']:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {row['contestant']} | {row['tokens_per_second']:,.0f} | {ratio} | {row['peak_gib']:.1f} GiB |")


if __name__ == "__main__":
    main()
