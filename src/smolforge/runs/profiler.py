"""Where the time of a few steps goes: torch's profiler, its trace, and a summary for people.

    profiler events -> time of each operator or kernel, and what it ran inside -> shares by kind, ten longest -> text

On a CPU an operator's own time counts, on a GPU its kernels' time; what is left of the wall time is idle.
trace.json.gz opens in https://ui.perfetto.dev.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

log = logging.getLogger("smolforge")

FOLDER, TRACE, SUMMARY = "profile", "trace.json.gz", "summary.txt"
LONGEST = 10
IDLE, REST = "idle, Python", "norms, elementwise"
INSIDE = {
    "data": r"^data$|dataloader",
    "optimizer": r"^optimizer|adam|muon|_foreach_|multi_tensor_apply",
    "attention": r"attention|scaled_dot_product|flash|fmha|sdpa",
}
"""Kinds that an operator is of when its name, or that of anything it runs inside, is like this."""
ITSELF = {
    "matrix products": r"^(?!triton_(poi|red|per)).*((?<![a-z])(add|b|badd)?mm(?![a-z])|gemm|nvjet|cutlass|splitk)",
    "copies, communication": r"memcpy|memset|nccl|gloo|c10d|all_?reduce|direct_copy|^aten::copy_",
}
"""Kinds by the operator's own name: the head's products are matrix products inside the loss."""
LOSS = r"^_LossSum$|cross_entropy|log_?softmax|nll_loss|logsumexp"
HOST = (
    r"^(ProfilerStep|forward$|backward$|other$)|^autograd::|^torch::autograd|Backward\d*$|^Torch-Compiled|TorchDynamo"
)


class OperatorTime(NamedTuple):
    """Seconds of one operator or kernel, with its name and the names of what it ran inside, outwards."""

    names: tuple[str, ...]
    seconds: float


class Profiler:
    """A context that profiles `steps` steps after one to warm up; `step` is called after each step, or as a callback.

    Writes FOLDER/profile/{trace.json.gz,summary.txt} when they are complete, or with those there were on exit.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self._stepped = folder / FOLDER, 0
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1),
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()],
            on_trace_ready=self._write,
        )

    def __enter__(self) -> "Profiler":
        self.profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.profiler.stop()

    def step(self, *_: Any) -> None:
        self._stepped += 1
        self.profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        steps = self._stepped - 1
        if steps < 1:
            log.warning("nothing was profiled: the first step, which warms up, was the last")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / TRACE))
        events = list(profiler.events() or ())
        wall = sum(e.cpu_time_total for e in events if e.name.startswith("ProfilerStep") and on_host(e)) / 1e6
        (self.folder / SUMMARY).write_text(format_summary(time_by_operator(events), wall, steps), "utf-8")
        log.info("%s says where the time of %d steps went", self.folder / SUMMARY, steps)


def on_host(event: Any) -> bool:
    return event.device_type == DeviceType.CPU and not event.is_async


def time_by_operator(events: Sequence[Any]) -> list[OperatorTime]:
    """Return the time of each operator of torch's FunctionEvents, or of each kernel where a GPU ran any."""
    host = [event for event in events if on_host(event)]
    device = [event for event in events if event.device_type != DeviceType.CPU]
    ranges = {event.name for event in device if event.is_user_annotation}  # shadows of the host's, and no work
    unclaimed: dict[str, float] = defaultdict(float)
    for kernel in device:
        unclaimed[kernel.name] += kernel.time_range.elapsed_us() / 1e6 if kernel.name not in ranges else 0
    if not any(unclaimed.values()):
        return [OperatorTime(operator_names(event), event.self_cpu_time_total / 1e6) for event in host]
    spans = []
    for event in host:
        for kernel in event.kernels:
            if kernel.name not in ranges:
                spans.append(OperatorTime((kernel.name, *operator_names(event)), kernel.duration / 1e6))
                unclaimed[kernel.name] -= kernel.duration / 1e6
    # those of CUDA graphs
    return spans + [OperatorTime((name,), left) for name, left in unclaimed.items() if left > 1e-7]


def operator_names(event: Any) -> tuple[str, ...]:
    """Return an event's own name and those of what it ran inside; a compiled graph's without its hash."""
    own = re.sub(r"^## Call (\w+) .*", r"\1", event.name)
    return (own, *operator_names(event.cpu_parent)) if event.cpu_parent else (own,)


@cache
def kind(names: tuple[str, ...]) -> str:
    """Return the kind of work an operator does."""
    for name_of_kind, like in INSIDE.items():
        if any(re.search(like, name, re.IGNORECASE) for name in names):
            return name_of_kind
    for name_of_kind, like in ITSELF.items():
        if re.search(like, names[0], re.IGNORECASE):
            return name_of_kind
    if any(re.search(LOSS, name, re.IGNORECASE) for name in names):
        return "loss"
    return IDLE if re.search(HOST, names[0]) else REST


def format_summary(spent: Iterable[OperatorTime], wall: float, steps: int) -> str:
    """Return a table of the time of `steps` steps that took `wall` seconds, by kind and by the longest operators."""
    kinds: dict[str, float] = defaultdict(float)
    operators: dict[str, list[float]] = defaultdict(list)
    for name, seconds in spent:
        kinds[kind(name)] += seconds
        if kind(name) != IDLE:
            operators[name[0]].append(seconds)
    kinds[IDLE] += max(0.0, wall - sum(kinds.values()))

    def line(name: str, seconds: float) -> str:
        return f"{seconds / wall:>7.1%}{1e3 * seconds / steps:>10.2f} ms  {name}"

    longest = sorted(operators.items(), key=lambda row: -sum(row[1]))[:LONGEST]
    return "\n".join(
        [
            f"{steps} steps of {1e3 * wall / steps:.2f} ms; milliseconds of one step\n",
            *(line(*row) for row in sorted(kinds.items(), key=lambda row: -row[1])),
            f"\nthe {len(longest)} longest operators, and how often a step has them\n",
            *(f"{line(name[:80], sum(times))}, {len(times) / steps:.0f} x" for name, times in longest),
            "",
        ]
    )
