"""Where the time of a few steps goes: torch's profiler, its trace, and its table of the longest operators.

trace.json.gz opens in https://ui.perfetto.dev.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity

log = logging.getLogger("smolforge")

FOLDER, TRACE, SUMMARY = "profile", "trace.json.gz", "summary.txt"
LONGEST = 20


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
            acc_events=True,  # torch 2.11 warns of what later cycles lose, and here is one
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
        averages = profiler.key_averages()
        seconds = sum(row.cpu_time_total for row in averages if row.key.startswith("ProfilerStep")) / 1e6
        where = "device" if any(row.self_device_time_total for row in averages) else "cpu"
        table = averages.table(f"self_{where}_time_total", LONGEST)
        head = f"{steps} steps of {1e3 * seconds / steps:.2f} ms, and their longest operators\n\n"
        (self.folder / SUMMARY).write_text(head + table, "utf-8", newline="\n")
        log.info("%s says where the time of %d steps went", self.folder / SUMMARY, steps)
