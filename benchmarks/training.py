"""A training step of ours beside Transformers' and litgpt's: same weights, batch, optimizer and machine.

    python benchmarks/training.py [--rounds 5] [--length 512] [--rows 4] [--preset smollm2-135m] [--dtype float32 ...]
                                  [--eager] [--peers transformers litgpt] [--litgpt PYTHON] [--json]

Each contestant lives in a process of its own, so that peak memory is its own; they take turns of two steps, so that
a busy machine hits all alike. The first step of a turn is not timed: it finds again the memory that was given back
after the last, when only weights and moments stay, 2 GiB of SmolLM2-135M for each contestant. What counts is the
ratio within a round. The losses must agree, or there is no table. bfloat16 is a race of its own, by default where
this processor multiplies it clearly faster than fp32.

`--eager` leaves out those that torch.compile has, and a minute or two for each. litgpt cannot be installed beside
Transformers 5: `make .litgpt` gives it an environment of its own, and `--litgpt .litgpt/bin/python` lets it take
part. Whoever is not there is a line that says so.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import job
from contest import Contestant, Entrant, race, start_by

OURS, THEIRS, LITGPT = "smolforge", "transformers", "litgpt"
COMPILED, SELECTIVE = " compiled", ", selective"
WAY_OUT = {THEIRS: "pip install transformers", LITGPT: "make .litgpt, and --litgpt .litgpt/bin/python"}
AGREEMENT = {"float32": (1e-4, 1e-3), "bfloat16": (2e-3, 0.1)}
"""Relative difference that rounding may make to the first loss, which is of the same weights, and to later ones."""
Result = dict[str, Any]


def names(asked: argparse.Namespace) -> list[str]:
    """Ours first: the others are measured by the last of ours, which also computes again what is cheap."""
    if asked.eager:
        return [OURS, *asked.peers]
    return [OURS, OURS + COMPILED, OURS + COMPILED + SELECTIVE, *(n + c for n in asked.peers for c in ("", COMPILED))]


def compete(asked: argparse.Namespace, dtype: str) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """What each contestant's turns gave, and why others failed."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as leaving:
        folder = job.prepared(asked.preset, Path(scratch) / "model")
        running = {name: leaving.enter_context(started(name, asked, dtype, folder)) for name in names(asked)}
        entrants = {name: Entrant(contestant) for name, contestant in running.items()}
        race(list(entrants.values()), asked.rounds, steps=1, warm=1)
    failed = {name: said(name, each.failed) for name, each in entrants.items() if each.failed is not None}
    return {name: each.turns for name, each in entrants.items() if name not in failed}, failed


def started(name: str, asked: argparse.Namespace, dtype: str, folder: Path) -> Contestant:
    peer, compiled = name.split()[0], "whole" if COMPILED in name else "no"
    maker = "peers:Smolforge" if peer == OURS else "peers:Peer"
    python = asked.litgpt if peer == LITGPT else None
    given = {"folder": folder, "rows": asked.rows, "length": asked.length, "peer": peer, "dtype": dtype}
    if SELECTIVE in name:
        given["checkpoint"] = "selective"
    return Contestant(maker, python, folder / f"{name}.log", **given, compiled=compiled)


def said(name: str, why: str) -> str:
    """Why a contestant failed; where it is not installed, how it could be."""
    peer = name.partition(" ")[0]
    return f"not installed here: {WAY_OUT[peer]}" if f"No module named '{peer}'" in why else why


def disagreement(found: dict[str, list[Result]], first: float, later: float) -> str | None:
    """A contestant whose loss is another than that of the first, one of ours, at some step."""
    by_name = {name: [loss for turn in turns for loss in turn["losses"]] for name, turns in found.items()}
    ours = next(iter(by_name.values()))
    for name, theirs in by_name.items():
        for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if not abs(mine - other) < (later if step else first) * mine:
                return f"{name} does another training: the loss of its step {step} is {other:.6f}, and ours {mine:.6f}"
    return None


def table(found: dict[str, list[Result]], tokens: int) -> list[Result]:
    """Medians over the rounds after the first; ratios within a round, to the last of ours."""
    seconds = {name: [turn["seconds"] for turn in turns[1:]] for name, turns in found.items()}
    peaks = {name: turns[-1]["peak_bytes"] for name, turns in found.items()}
    ours = [name for name in found if name.startswith(OURS)][-1]
    rows = []
    for name, taken in seconds.items():
        ratios = [theirs / mine for mine, theirs in zip(seconds[ours], taken, strict=True)]
        row = {
            "contestant": name,
            "tokens_per_second": tokens / statistics.median(taken),
            "times_slower_than": ours,
            "times_slower": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "peak_bytes": peaks[name],
            "our_share_of_its_memory": peaks[ours] / peaks[name],
            "first_step_seconds": found[name][0]["seconds"],
        }
        if COMPILED in name and not found[name][-1]["graphs"]:
            row["note"] = "torch.compile made nothing"
        rows.append(row)
    return rows


def page(rows: list[Result], failed: dict[str, str]) -> str:
    ours = rows[0]["times_slower_than"]
    lines = [
        f"| contestant | tokens/s | {ours} is faster by (range) | peak memory | {ours} takes of it | first step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["range"]
        cells = [
            row["contestant"] + (f" ({row['note']})" if "note" in row else ""),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['times_slower']:.2f} ({low:.2f} to {high:.2f})",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
            f"{row['our_share_of_its_memory']:.0%}",
            f"{row['first_step_seconds']:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | {why} | | | | |" for name, why in failed.items()]
    return "\n".join(lines)


def fast_dtypes() -> list[str]:
    """fp32, and bfloat16 where it is worth having on this processor."""
    import torch

    from smolforge.device import fastest_dtype

    return list(dict.fromkeys(["float32", fastest_dtype(torch.device("cpu"))]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", choices=list(AGREEMENT), help="by default those that are fast here")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--peers", nargs="*", default=[THEIRS, LITGPT], choices=[THEIRS, LITGPT])
    parser.add_argument("--litgpt", metavar="PYTHON", help="the interpreter of an environment that has litgpt")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    asked = parser.parse_args()
    start_by("forkserver", "torch._dynamo")  # AdamW imports it
    results: dict[str, Result] = {}
    for dtype in asked.dtype or fast_dtypes():
        found, failed = compete(asked, dtype)
        if not any(name.startswith(OURS) for name in found):
            sys.exit(f"ours did not run: {failed}")
        if wrong := disagreement(found, *AGREEMENT[dtype]):
            sys.exit(wrong)
        results[dtype] = {"rows": table(found, asked.rows * asked.length), "failed": failed}
        if not asked.json:
            print(f"{asked.preset}, {asked.rows} x {asked.length} tokens, {dtype}, {asked.rounds} rounds\n")
            print(page(**results[dtype]), end="\n\n", flush=True)
    if asked.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
