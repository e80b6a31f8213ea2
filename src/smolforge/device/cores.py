"""How many processor cores a process may use: those it may run on, no more than its container pays for."""

import os
import sys
from pathlib import Path

CGROUPS, MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> float:
    """Cores' worth of time, a fraction where a quota says so."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(float(allowed), *quotas())


def quotas(mine: Path = MINE, root: Path = CGROUPS) -> list[float]:
    """The limits of a process' control group and of all above it, of both versions; unlimited ones are infinite.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max; docs.kernel.org/scheduler/sched-bwc.html of version 1.
    """
    found = [float("inf")]
    for kind, place in _groups(mine):
        folders = [place, *place.parents]
        if kind == "":
            found += [_quota(*_words(root / folder / "cpu.max")) for folder in folders]
        elif "cpu" in kind.split(","):
            for folder in (root / kind / each for each in folders):
                found.append(_quota(*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")))
    return found


def _groups(mine: Path) -> list[tuple[str, Path]]:
    """(controllers, place) of each hierarchy a process is in; version 2 names no controllers."""
    try:
        lines = [line.split(":", 2) for line in mine.read_text().splitlines()]
    except OSError:
        return []
    return [(kind, Path(place.lstrip("/"))) for _, kind, place in (line for line in lines if len(line) == 3)]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _quota(quota: str = "max", period: str = "100000") -> float:
    """Cores that microseconds in each period are; version 2 says max where there is no limit, version 1 says -1."""
    try:
        return int(quota) / int(period) if int(quota) > 0 else float("inf")
    except (ValueError, ZeroDivisionError):
        return float("inf")
