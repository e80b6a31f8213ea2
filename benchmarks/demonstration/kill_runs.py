"""Run one contestant for a given number of seconds, uninterrupted or with random kills and restarts.

The clock runs from the first start to the end, imports and restarts included: what a person waits.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from contestants import CONTESTANTS, Contestant
from watch import read

SOON = 60
"""Seconds within which a start that fails had a reason to, which is not ours."""
MEAN_SECONDS = 30
"""Between kills."""


@dataclass
class Run:
    """What was seen of one run from outside."""

    began: float = 0.0
    starts: list[float] = field(default_factory=list)
    killed: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failures: list[str] = field(default_factory=list)
    """Last lines of starts that ended by themselves."""
    helped: int = 0
    """Checkpoints that a person had to delete for it to go on."""


def moments(seed: int, seconds: float) -> list[float]:
    """When to kill, in seconds from the first start: the same for every contestant."""
    chance, at, found = random.Random(seed), 0.0, list[float]()
    while (at := at + chance.expovariate(1 / MEAN_SECONDS)) < seconds - 5:
        found.append(at)
    return found or [seconds / 2]


def run(name: str, setup: Path, out: Path, seed: int, seconds: float, kills: bool) -> Run:
    """Run it, or find that it was: out/run.json says so."""
    if (out / "run.json").is_file():
        return Run(**json.loads((out / "run.json").read_text()))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    seen, ends = Run(began=time.time()), [*(moments(seed, seconds) if kills else []), seconds]
    for end in ends:
        until, failed = seen.began + end, 0
        while time.time() < until:
            failed = failed + 1 if _life(CONTESTANTS[name], setup, out, seed, until, seen) else 0
            if failed == 2:
                _help(CONTESTANTS[name], out, seen)
                failed = 0
        if end != seconds:
            seen.killed.append(end)
    (out / "run.json").write_text(json.dumps(asdict(seen)) + "\n")
    return seen


def _life(contestant: Contestant, setup: Path, out: Path, seed: int, until: float, seen: Run) -> bool:
    """One process from its start to its kill, or to its own end; whether that came soon."""
    begun = time.time()
    seen.starts.append(begun - seen.began)
    with (out / "output.log").open("ab") as log:
        command = contestant.command("train", str(setup), str(out), str(seed))
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=Path(__file__).parent)
    seen.peak_bytes = max(seen.peak_bytes, _waited(child, until))
    if time.time() >= until:
        return False
    lines = (out / "output.log").read_text(errors="replace").strip().splitlines()
    seen.failures.append(lines[-1][:300] if lines else "no word")
    return time.time() - begun < SOON


def _waited(child: subprocess.Popen, until: float) -> int:
    """Wait for its end, or bring it about; its peak of memory in bytes. The whole session goes with it."""
    peak = 0
    while time.time() < until and child.poll() is None:
        peak = max(peak, _peak_bytes(child.pid))
        time.sleep(min(0.05, max(0.0, until - time.time())))
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return peak


def _peak_bytes(pid: int) -> int:
    """As the kernel counts it since the program began; what wait4 tells begins with that of whoever started it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    kilobytes = re.search(r"VmHWM:\s*(\d+) kB", status)
    return 1024 * int(kilobytes[1]) if kilobytes else 0


def _help(contestant: Contestant, out: Path, seen: Run) -> None:
    """After a second failure in a row delete what a start reads, as a person would."""
    if found := contestant.module.resumes_from(out):
        newest = found[max(found)]
        shutil.rmtree(newest.parent) if newest.parent.name != "run" else newest.unlink()
        seen.helped += 1


def restarts(out: Path, seen: Run) -> list[float]:
    """Seconds from each start to the first step after it; of starts that came to none, nothing."""
    steps = [line["time"] - seen.began for line in read(out)]
    found = []
    for start, end in zip(seen.starts, [*seen.starts[1:], float("inf")], strict=True):
        within = [at for at in steps if start < at < end]
        found += [min(within) - start] if within else []
    return found
