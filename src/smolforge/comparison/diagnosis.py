"""Why a run is slow, from what it wrote down: sentences, the most expensive first, each with the way out as a flag.

    metrics.jsonl of the last start -> Evidence -> every look finds something, or nothing

Shares are of the time of all steps and what passes between them, the first step aside. Where a flag is fixed within a
run, the sentence says that it is for a new one.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from smolforge.comparison.step_times import (
    BETWEEN,
    KINDS,
    Cost,
    Evidence,
    Record,
    costs,
    number,
    of_start,
    shares,
    timed_steps,
)
from smolforge.config import Recipe
from smolforge.config.base import leaves
from smolforge.device import CLEARLY
from smolforge.device.environment import hurting
from smolforge.device.peak_flops import published
from smolforge.models.stats import parameter_counts
from smolforge.runs.auto import BUSY_TOKENS, WORTH_COMPILING_SECONDS

FEWEST_STEPS = 5
"""Fewer, after the first, are chance."""
DATA = 0.05
"""Healthy runs wait a thousandth of their time: batches are read ahead."""
PAUSES = 0.05
"""Of one kind. The recipes' own intervals come to 1 or 2 %."""
TOLERABLE = 0.02
"""What an interval is proposed for."""
OPTIMIZER = 0.25
"""AdamW takes some 5 % of a step of a usual batch, Muon 9 to 12 % of nano's: docs/performance.md."""
SLOW, EVEN, LOST = 2.0, 1.25, 0.05
"""Steps are uneven where one in twenty takes twice the median, and time beyond a quarter more than it adds up."""
FALLING, FALLING_STEPS = 1.25, 40
"""The last quarter's median step over the first's; steps differ by a tenth for no reason at all."""
FIRST_SECONDS, FIRST = 30, 0.10
"""What a first step takes longer than others, and its share of the run as it is planned."""
LONG = 2
"""The time a run takes is foreseen within a factor of two: so many times as long as is worth compiling is sure."""
COMPILED = 0.05
"""What a compiled program gains, measured on a processor: docs/performance.md."""
FEW_TOKENS = 8
"""A micro-batch is tiny where it is so many times smaller than what keeps the device busy."""
BUSY_GPU = 80
"""Per cent of the time; a GPU that is fed has 95 and more."""
TAKEN_CORES = 0.5
"""Cores that other programs keep busy, in the median, before they are worth a sentence."""
USUAL_MFU = {
    "cpu": (1_000_000, 0.40, "0.4 to 0.8, as nano has in bfloat16 and SmolLM2-135M in fp32"),
    "cuda": (100_000_000, 0.40, "0.4 to 0.6 for 100M parameters and more, as llm.c has on A100"),
}
"""For so many parameters and more: what is usual, in words too. Smaller ones on a GPU are nowhere near, and may be."""
LOW = 0.5
"""Of what is usual."""


class Finding(NamedTuple):
    share: float
    """Of the time, that it costs as far as is known."""
    says: str


def diagnose(records: Sequence[Record], recipe: Recipe, start: Record, fastest_dtype: str | None = None) -> list[str]:
    """Why the run's last start is slow, in sentences; one that says where the time goes if nothing stands out.

    `start` is its entry in environment.json, `{}` if there is none; `fastest_dtype` that of its machine, where known.
    What hurts in the environment comes first: it spoils every other figure, and costs nothing to change.
    """
    lines = of_start(records, start)
    steps = timed_steps(lines)
    habits = [f"{habit}." for habit in habits_of(start, lines)]
    if len(steps) <= FEWEST_STEPS:
        few = f"{len(steps)} steps of the last start say how long they took"
        return [*habits, f"{few}; {FEWEST_STEPS + 1} would tell where the time goes."]
    run = Evidence(recipe, start, lines, steps[0], steps[1:], shares(steps[1:]), fastest_dtype)
    found = sorted((each for look in LOOKS for each in look(run)), key=lambda each: -each.share)
    return [*habits, *(each.says for each in found)] or [f"Nothing stands out: {where(run.shares)}."]


def habits_of(start: Record, lines: Sequence[Record]) -> list[str]:
    """What hurts in a start's surroundings; other programs are told by what was measured, where it was."""
    seen = dict(start.get("seen") or {})
    if any("machine_cpu_percent" in line for line in lines):
        seen.pop("load", None)
    threads, ranks = number(start, "threads"), number(start, "ranks")
    return hurting(seen, int(threads), str(start.get("device")), int(ranks or 1)) if threads else []


def data(run: Evidence) -> list[Finding]:
    share, workers = run.shares["data"], run.recipe.data.num_workers
    if share < DATA:
        return []
    more = f"--data.num-workers {max(2, 2 * workers)} reads further ahead (it is {workers})"
    return [
        Finding(share, f"Waiting for data takes {percent(share)} of the time; {more}, and a faster disk gives more.")
    ]


def pauses(run: Evidence) -> list[Finding]:
    """Each kind of what happens between steps, by itself where that can be told."""
    found = []
    for cost in costs(run.steps, run.recipe):
        share = cost.seconds * cost.times / run.total
        if share >= PAUSES:
            found.append(Finding(share, pause(run, cost, share)))
    return found


def pause(run: Evidence, cost: Cost, share: float) -> str:
    """What it takes, and how to have it less often, or shorter."""
    took = f"take{'s' * (len(cost.kinds) < 2)} {percent(share)} of the time, {cost.seconds:.2g} s"
    if not cost.kinds:
        return (
            f"What is written down after every step {took} each; fewer trackers (--report.to none) or a faster disk "
            "for the run's folder leave more."
        )
    kinds, values = sorted(cost.kinds), leaves(run.recipe)
    rarer = [f"{flag(KINDS[kind].setting)} {rarer_than(values[KINDS[kind].setting], share)}" for kind in kinds]
    ways = [" and ".join(rarer) + " would be rare enough"]
    if "measured" in kinds:
        ways.append(
            f"a smaller --train.evaluate-tokens (it is {run.recipe.train.evaluate_tokens or 'all'}) measures less"
        )
    if "saved" in kinds and not run.recipe.train.checkpoint_in_background:
        ways.append("--train.checkpoint-in-background true does not wait for the disk")
    what = " and ".join(KINDS[kind].says for kind in kinds)
    return f"{what.capitalize()} {took} each of {cost.times:,} times; {'; '.join(ways)}."


def rarer_than(every: int | None, share: float) -> int:
    """An interval, a multiple of this one, at which it is tolerable."""
    return (every or 1) * math.ceil(share / TOLERABLE)


def optimizer(run: Evidence) -> list[Finding]:
    share, name, batch = run.shares["optimizer"], run.recipe.optim.name, run.recipe.train.batch_tokens
    if share < OPTIMIZER:
        return []
    cheaper = ", or --optim.name adamw, whose step costs less than Muon's" if name == "muon" else ""
    return [
        Finding(
            share,
            f"The optimizer takes {percent(share)} of the time, which does not grow with the batch: a new run with "
            f"--train.batch-tokens {4 * batch} (it is {batch}) takes that step for four times the tokens{cheaper}.",
        )
    ]


def precision(run: Evidence) -> list[Finding]:
    """Whether fp32 costs speed: by the peaks of a GPU, or by what was measured where the caller knows the machine."""
    row = published(str(run.start.get("name"))) if run.device == "cuda" else None
    known = row is not None and row.bfloat16 is not None and row.bfloat16 > CLEARLY * row.float32
    if run.recipe.train.dtype != "float32" or not (known or run.fastest_dtype == "bfloat16"):
        return []
    products = run.shares["forward"] + run.shares["backward"]
    return [
        Finding(
            products * (1 - 1 / CLEARLY),
            f"Forward and backward, {percent(products)} of the time, multiply in float32, and this machine is clearly "
            "faster in bfloat16: a new run with --train.dtype bfloat16.",
        )
    ]


def compiling(run: Evidence) -> list[Finding]:
    worth = WORTH_COMPILING_SECONDS.get(run.device)
    if run.recipe.train.compile is not False or worth is None or run.planned < LONG * worth:
        return []
    return [
        Finding(
            COMPILED,
            f"The program is not compiled, in a start of {run.planned / 3600:.1f} hours: --train.compile true takes a "
            f"minute or two and gains some {percent(COMPILED)} on a processor, on a GPU more.",
        )
    ]


def first_step(run: Evidence) -> list[Finding]:
    more = run.first.seconds - statistics.median(run.seconds)
    share = more / (run.planned + run.first.seconds)
    if more < FIRST_SECONDS or share < FIRST:
        return []
    way_out = (
        "--train.compile false is ready at once" if run.recipe.train.compile is True else "a longer run forgets it"
    )
    says = f"The first step took {more:.0f} s longer than others, {percent(share)} of this start as it is planned"
    return [Finding(share, f"{says}: that is for programs and memory made once; {way_out}.")]


def micro_batches(run: Evidence) -> list[Finding]:
    """Whether a GPU gets its batch in crumbs."""
    train, busy = run.recipe.train, BUSY_TOKENS.get(run.device)
    share_of_rows = max(1, train.rows // run.ranks)
    rows = min(train.micro_rows, share_of_rows)
    tokens, count = rows * train.sequence_length, math.ceil(share_of_rows / rows)
    if busy is None or count < 2 or tokens * FEW_TOKENS > busy:
        return []
    more = min(share_of_rows, busy // train.sequence_length)
    peak = run.median("peak_memory_bytes")
    room = f" if memory allows ({peak / 2**30:.1f} GiB are used now)" if peak else ""
    return [
        Finding(
            run.shares["forward"] + run.shares["backward"],
            f"Each step is {count} micro-batches of {tokens:,} tokens, and a GPU is busy from about {busy:,}: "
            f"--train.micro-batch-size {more} (it is {rows}){room}.",
        )
    ]


def idle_gpu(run: Evidence) -> list[Finding]:
    busy = run.median("gpu_percent")
    if busy is None or busy >= BUSY_GPU:
        return []
    return [
        Finding(
            1 - busy / 100,
            f"The GPU has work in {busy:.0f} % of the time: the processor does not ask for it fast enough. A larger "
            "--train.micro-batch-size makes fewer and larger kernels, --train.compile true makes one of many.",
        )
    ]


def utilisation(run: Evidence) -> list[Finding]:
    """Share of the device's peak, against what models of this size reach."""
    mfu, parameters = run.median("mfu"), sum(parameter_counts(run.recipe.model).values())
    fewest, usual, said = USUAL_MFU.get(run.device, (math.inf, 0.0, ""))
    if mfu is None or mfu <= 0 or parameters < fewest or mfu >= LOW * usual:
        return []
    return [
        Finding(
            1 - mfu / usual,
            f"MFU is {mfu:.1%}, and {said}, is usual: the device does less than half of what it could. If nothing "
            "else here explains it, --profile 5 shows where a step's time goes.",
        )
    ]


def uneven(run: Evidence) -> list[Finding]:
    seconds = sorted(run.seconds)
    usual, late = statistics.median(seconds), seconds[int(0.95 * len(seconds))]
    lost = sum(max(0.0, each - EVEN * usual) for each in seconds) / run.total
    if late < SLOW * usual or lost < LOST:
        return []
    says = f"One step in twenty takes {late / usual:.1f} times the median or longer, which loses {percent(lost)} of the"
    return [Finding(lost, f"{says} time: other programs, a disk that is slow at times, or a machine that is shared.")]


def falling(run: Evidence) -> list[Finding]:
    seconds, quarter = run.seconds, len(run.seconds) // 4
    if len(seconds) < FALLING_STEPS:
        return []
    early, late = statistics.median(seconds[:quarter]), statistics.median(seconds[-quarter:])
    if late < FALLING * early:
        return []
    lost = max(0.0, sum(seconds) - early * len(seconds)) / run.total
    says = f"Steps take {late / early:.1f} times as long at the end as at the beginning, {percent(lost)} of the time"
    look = "nvidia-smi -q -d PERFORMANCE says whether it is" if run.device == "cuda" else "top shows programs beside it"
    return [Finding(lost, f"{says}: a device that grows hot and slows down, or other programs; {look}.")]


def crowded(run: Evidence) -> list[Finding]:
    """Whether other programs had the cores that this one's threads wanted, in the median of what was measured."""
    cores, threads = number(run.start.get("seen") or {}, "machine_cores"), number(run.start, "threads")
    mine, all_ = run.median("cpu_percent"), run.median("machine_cpu_percent")
    if run.device != "cpu" or run.ranks > 1 or not cores or not threads or mine is None or all_ is None:
        return []
    others = max(0.0, cores * all_ - mine) / 100
    lost = 1 - mine / 100 / threads
    if others < TAKEN_CORES or cores - others > threads - TAKEN_CORES / 2 or lost < LOST:
        return []
    return [
        Finding(
            lost,
            f"Other programs keep {others:.1f} of {cores:.0f} cores busy, and this run's {threads:.0f} threads got "
            f"{mine / 100:.1f}: {percent(lost)} of their time is lost; end those programs, or wait for them.",
        )
    ]


LOOKS: tuple[Callable[[Evidence], list[Finding]], ...] = (
    data,
    pauses,
    optimizer,
    precision,
    compiling,
    first_step,
    micro_batches,
    idle_gpu,
    utilisation,
    uneven,
    falling,
    crowded,
)


def where(found: Mapping[str, float]) -> str:
    """Shares in words, those that can be seen, the largest first."""
    names = {"data": "waiting for data", "optimizer": "the optimizer", "other": "the rest of a step"}
    names[BETWEEN] = "what passes between steps"
    seen = sorted(((share, part) for part, share in found.items() if share >= 0.005), reverse=True)
    first, *rest = [
        f"{names.get(part, part)}{' takes' * (not place)} {percent(share)}" for place, (share, part) in enumerate(seen)
    ]
    return ", ".join([f"{first} of the time", *rest])


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def flag(setting: str) -> str:
    """How the command line says it."""
    return "--" + setting.replace("_", "-")
