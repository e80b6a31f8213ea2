"""The head and its loss, forward and backward: ours beside torch's chunked and plain cross-entropy.

    python benchmarks/head.py [--tokens 2048] [--vocabulary 49152] [--width 576] [--rounds 5]
                              [--device cpu] [--bfloat16]

Contestants take turns in one process; what counts is the ratio to the plain one within a round. On a processor the
time is the process's own on one thread, so that a busy machine does not hide the work. Memory is what a step adds
at its peak, each in a fresh process. Every contestant's gradients must agree with the plain one's.
"""

import argparse
import multiprocessing as mp
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolforge.training import loss

PLAIN, CHUNKS = "F.cross_entropy", (256, 512, 1024, 2048, 4096, 8192)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, head), labels, reduction="sum")


def torchs(size: int) -> Loss:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=size)
    return lambda states, head, labels: F.linear_cross_entropy(states, head, labels, reduction="sum", options=options)


def ours(size: int) -> Loss:
    def loss_sum(states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        loss.chunk_tokens = lambda device: size
        return loss.loss_sum(states[None], head, labels[None])[0]

    return loss_sum


def contestants(tokens: int) -> dict[str, Loss]:
    sizes = [size for size in CHUNKS if size <= tokens]
    theirs = {f"F.linear_cross_entropy, {size}": torchs(size) for size in sizes if "linear_cross_entropy" in dir(F)}
    return {PLAIN: plain} | theirs | {f"smolforge, {size}": ours(size) for size in sizes}


class Problem:
    """Random states, head and labels, and a step over them."""

    def __init__(self, asked: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(asked.device)
        self.states = torch.randn(asked.tokens, asked.width, device=self.device, requires_grad=True)
        self.head = torch.empty(asked.vocabulary, asked.width, device=self.device).normal_(0, 0.02).requires_grad_()
        self.labels = torch.randint(asked.vocabulary, (asked.tokens,), device=self.device)
        self.bfloat16 = asked.bfloat16

    def step(self, loss: Loss) -> tuple[Tensor, Tensor]:
        self.states.grad = self.head.grad = None
        lowered: AbstractContextManager = torch.autocast(self.device.type, torch.bfloat16)
        with lowered if self.bfloat16 else nullcontext():
            total = loss(self.states, self.head, self.labels)
        (total / len(self.labels)).backward()
        return self.states.grad, self.head.grad

    def seconds(self, loss: Loss) -> float:
        cpu = self.device.type == "cpu"
        clock = time.process_time if cpu else time.perf_counter
        start = clock()
        self.step(loss)
        if not cpu:
            torch.cuda.synchronize()
        return clock() - start


def added_bytes(asked: argparse.Namespace, name: str) -> int:
    """What one step of a contestant needs at its peak beyond states, head and labels."""
    problem, small = Problem(asked), Problem(argparse.Namespace(**vars(asked) | {"tokens": 2, "vocabulary": 9}))
    small.step(contestants(asked.tokens)[name])  # what a first call loads is not the step's
    if asked.device != "cpu":
        before = torch.cuda.memory_allocated()
        problem.step(contestants(asked.tokens)[name])
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem.step(contestants(asked.tokens)[name])
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def apart(work: Callable[..., int], *given: object) -> int:
    """What a function returns in a fresh process."""
    with mp.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(work, given)


def times(asked: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step by contestant, after a round that checks gradients."""
    if asked.device == "cpu":
        torch.set_num_threads(1)
    problem, taking_part = Problem(asked), contestants(asked.tokens)
    expected = [grad.clone() for grad in problem.step(plain)]
    for name, each in taking_part.items():
        for grad, right in zip(problem.step(each), expected, strict=True):
            off = float((grad - right).norm() / right.norm())
            assert off < (3e-2 if asked.bfloat16 else 1e-5), f"{name}: a gradient is off by {off:.1e}"
    taken: dict[str, list[float]] = {name: [] for name in taking_part}
    for _ in range(asked.rounds):
        for name, each in taking_part.items():
            taken[name].append(problem.seconds(each))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 2048, "vocabulary": 49152, "width": 576, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true")
    asked = parser.parse_args()
    needed = {name: apart(added_bytes, asked, name) for name in contestants(asked.tokens)}  # a child inherits the peak
    taken = times(asked)
    print(f"{asked.tokens} tokens, vocabulary {asked.vocabulary}, width {asked.width}, {asked.rounds} rounds\n")
    print(
        "| contestant, tokens a chunk | seconds | of plain (range) | added memory at the peak, MB |\n|---|---|---|---|"
    )
    for name, seconds in taken.items():
        shares = [one / other for one, other in zip(seconds, taken[PLAIN], strict=True)]
        share = f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
        print(f"| {name} | {statistics.median(seconds):.3f} | {share} | {needed[name] / 1e6:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
