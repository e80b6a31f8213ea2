"""What a run left behind, measured: bits per byte of every checkpoint, the same weights or not, rows, a flipped bit."""

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from contestants import CONTESTANTS
from kill_runs import Run, restarts
from shared_setup import settings
from watch import FILE, read

PATIENCE = 180
"""Seconds in which a start shows whether it notices a flipped bit."""
SETTLED = 5
"""Steps after a start before speed counts."""


class Point(NamedTuple):
    """A checkpoint: after so many steps and seconds, so good."""

    step: int
    seconds: float
    bits_per_byte: float
    sha256: str


def points(name: str, setup: Path, out: Path, seen: Run) -> list[Point]:
    """All checkpoints of a run, in turn; out/points.json keeps them."""
    kept = out / "points.json"
    if not kept.is_file():
        exported = out / "exported"
        subprocess.run(CONTESTANTS[name].command("export", str(out), str(exported)), check=True, capture_output=True)
        files = CONTESTANTS[name].module.checkpoints(out)
        found = [
            Point(step, files[step].stat().st_mtime - seen.began, *measured(setup, exported / f"{step}.safetensors"))
            for step in sorted(files)
            if (exported / f"{step}.safetensors").is_file()
        ]
        kept.write_text(json.dumps(found) + "\n")
        shutil.rmtree(exported)
    return [Point(*each) for each in json.loads(kept.read_text())]


def measured(setup: Path, file: Path) -> tuple[float, str]:
    """Bits per byte of the validation text, in sequences of the trained length, by Transformers; the weights' hash."""
    import torch
    from safetensors.torch import load_file

    model, state, (rows, labels) = judge(setup), load_file(file), held_out(setup)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and {*missing} <= {"lm_head.weight"}, (file, missing, unexpected)
    model.tie_weights()
    nats = 0.0
    with torch.inference_mode():
        for ids, following in zip(rows.split(32), labels.split(32), strict=True):
            logits = model(ids).logits.flatten(0, 1)
            nats += torch.nn.functional.cross_entropy(logits, following.flatten(), reduction="sum").item()
    content = hashlib.sha256()
    for key in sorted(state):
        if key != "lm_head.weight":
            content.update(key.encode() + state[key].contiguous().numpy().tobytes())
    return nats / math.log(2) / settings(setup)["held_out_bytes"], content.hexdigest()


@cache
def judge(setup: Path) -> Any:
    """A model of the shape, to be filled."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(setup / "model").eval()


@cache
def held_out(setup: Path) -> tuple[Any, Any]:
    """Rows of ids and the labels that follow them; the text begins after the end of a document."""
    import torch
    from tokenizers import Tokenizer

    tokenizer, length = (
        Tokenizer.from_file(str(setup / "tokenizer" / "tokenizer.json")),
        settings(setup)["sequence_length"],
    )
    ids = [tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode((setup / "held_out.txt").read_text("utf-8")).ids]
    count = -(-(len(ids) - 1) // length)
    rows = torch.zeros(count * length, dtype=torch.long)
    labels = torch.full((count * length,), -100)
    rows[: len(ids) - 1], labels[: len(ids) - 1] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    return rows.view(count, length), labels.view(count, length)


def at(found: Sequence[Point], seconds: float) -> float | None:
    """What one has after so many seconds: the newest checkpoint by then."""
    by_then = [point for point in found if point.seconds <= seconds]
    return max(by_then, key=lambda point: point.seconds).bits_per_byte if by_then else None


def same(uninterrupted: Sequence[Point], with_kills: Sequence[Point]) -> bool | None:
    """Whether the last checkpoint that both have holds bitwise identical weights."""
    ours, theirs = ({point.step: point.sha256 for point in each} for each in (uninterrupted, with_kills))
    both = ours.keys() & theirs.keys()
    return ours[max(both)] == theirs[max(both)] if both else None


def rows(out: Path) -> dict[int, list[str]]:
    """The rows of each step, as it counts in the end: of a step taken twice, the last."""
    return {line["step"]: line["rows"] for line in read(out)}


def repeated_or_skipped(uninterrupted: Path, with_kills: Path) -> tuple[int, int, int]:
    """Count sequences that the killed run saw more often than the uninterrupted one, less often, and all of them."""
    ours, theirs = rows(uninterrupted), rows(with_kills)
    last = min(max(ours, default=0), max(theirs, default=0))
    calm, killed = (
        Counter(itertools.chain.from_iterable(each.get(step, []) for step in range(1, last + 1)))
        for each in (ours, theirs)
    )
    return (killed - calm).total(), (calm - killed).total(), calm.total()


def tokens_per_second(setup: Path, out: Path, seen: Run) -> float | None:
    """Median over the steps that follow one another within a life, after its first few; None where none do."""
    given, times = settings(setup), list[float]()
    for life in lives(out, seen):
        times += [later - earlier for earlier, later in itertools.pairwise(life[SETTLED:])]
    return given["rows"] * given["sequence_length"] / statistics.median(times) if times else None


def lives(out: Path, seen: Run) -> Iterator[list[float]]:
    """Times of the steps of each start."""
    steps = [line["time"] - seen.began for line in read(out)]
    for start, end in zip(seen.starts, [*seen.starts[1:], math.inf], strict=True):
        yield [each for each in steps if start < each < end]


def notices_a_flipped_bit(name: str, setup: Path, out: Path, seed: int) -> bool | None:
    """Whether a start from a checkpoint with one bit flipped does anything but go on from it."""
    kept = out / "flipped.json"
    if not kept.is_file():
        kept.write_text(json.dumps(_notices(name, setup, out, seed)))
    return json.loads(kept.read_text())


def _notices(name: str, setup: Path, out: Path, seed: int) -> bool | None:
    module = CONTESTANTS[name].module
    found = module.resumes_from(out)
    newest = max(found, default=0)
    if not newest or not found[newest].is_file():  # no checkpoint, or the last kill came while it was written
        return None
    copy = out.with_name(out.name + "-flipped")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy)
    (copy / FILE).unlink()
    flip(module.resumes_from(copy)[newest])
    first, ended = first_step(name, setup, copy, seed)
    shutil.rmtree(copy)
    return first != newest + 1 if first is not None or ended else None


def flip(file: Path) -> None:
    """One bit in the middle: among the weights or moments of any file of theirs."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


def first_step(name: str, setup: Path, out: Path, seed: int) -> tuple[int | None, bool]:
    """The first step of a start, if it comes to one in time, and whether it ended without any."""
    with (out / "output.log").open("wb") as log:
        command = CONTESTANTS[name].command("train", str(setup), str(out), str(seed))
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    until = time.time() + PATIENCE
    while child.poll() is None and time.time() < until and not read(out):
        time.sleep(0.2)
    ended = child.poll() is not None
    if not ended:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return (read(out)[0]["step"] if read(out) else None), ended


def summary(name: str, setup: Path, outs: Mapping[str, Path], seen: Mapping[str, Run], marks: Sequence[float]) -> dict:
    """One contestant, one seed: every column."""
    found = {kind: points(name, setup, outs[kind], seen[kind]) for kind in outs}
    first, again = (
        restarts(outs["uninterrupted"], seen["uninterrupted"]),
        restarts(outs["with_kills"], seen["with_kills"])[1:],
    )
    return {
        "bits_per_byte": {kind: {f"{mark:g}": at(found[kind], mark) for mark in marks} for kind in outs},
        "tokens_per_second": tokens_per_second(setup, outs["uninterrupted"], seen["uninterrupted"]),
        "peak_bytes": seen["uninterrupted"].peak_bytes,
        "same_weights": same(found["uninterrupted"], found["with_kills"]),
        "rows": repeated_or_skipped(outs["uninterrupted"], outs["with_kills"]),
        "kills": len(seen["with_kills"].killed),
        "restart_seconds": statistics.median(again) if again else None,
        "first_step_seconds": first[0] if first else None,
        "helped": seen["with_kills"].helped,
        "failures": seen["with_kills"].failures,
        "points": {kind: found[kind] for kind in outs},
        "killed": seen["with_kills"].killed,
    }
