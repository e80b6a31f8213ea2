"""What `smolforge inspect` knows of speed: where a run's time goes, why it is slow, what hurts on this machine."""

import os
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from smolforge.cli.blocks import bar

WIDEST, BAR = 100, 40
PARTS = {"data": "waiting for data", "other": "rest of a step", "between": "between steps"}


def of_run(run: Any) -> dict[str, Any]:
    """`time`, the share of each part, and `slow`, what to do about it, of a run's history."""
    from smolforge.comparison.diagnosis import diagnose
    from smolforge.comparison.evidence import time_shares

    start = (run.starts or [{}])[-1]
    said = diagnose(run.metrics, run.recipe, start, _fastest_dtype(run.recipe, start)) if run.metrics else []
    return {"time": time_shares(run.metrics, start), "slow": said}


def _fastest_dtype(recipe: Any, start: Mapping[str, Any]) -> str | None:
    """What this machine multiplies fastest in, if it matters and the run was on one like it."""
    from smolforge.device import describe, fastest_dtype, pick_device

    if recipe.train.dtype != "float32" or not start:
        return None
    device = pick_device("auto")
    here = describe(device)
    return fastest_dtype(device) if all(here[key] == start.get(key) for key in ("device", "name", "vectors")) else None


def of_machine(device: str, threads: int) -> dict[str, Any]:
    """Cores, load, what is set, and `slow`, what of it hurts."""
    from smolforge.device.conditions import hurting, surroundings

    seen = surroundings(os.environ)
    return {**seen, "slow": hurting(seen, threads, device)}


def lines(facts: Mapping[str, Any]) -> list[str]:
    """Where the time goes, as bars, and each sentence."""
    width = min(WIDEST, shutil.get_terminal_size().columns)
    time, said = facts.get("time", {}), facts.get("slow", [])
    bars = [
        f"  {PARTS.get(part, part):<18}{share:>5.0%}  {bar(share, min(BAR, width - 27))}"
        for part, share in time.items()
    ]
    told = [
        line
        for each in said
        for line in textwrap.wrap(each, width, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    ]
    return [*(["", "where the time goes"] if bars else []), *bars, *([""] if told else []), *told]
