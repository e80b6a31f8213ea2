"""Why a run is slow, from what it wrote down: sentences, the most expensive first, each with its fix as a flag.

    metrics.jsonl of the last start -> RunTimings -> each check returns bottlenecks, or none

Shares are of the time of all steps and what passes between them, the first step aside. Where a flag is fixed within a
run, the sentence says that it is for a new one.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from smolforge.comparison.history import Record, finite_number
from smolforge.comparison.step_times import (
    BETWEEN,
    PAUSE_KINDS,
    PauseCost,
    RunTimings,
    pause_costs,
    phase_shares,
    records_of_start,
    timed_steps,
)
from smolforge.config import Recipe
from smolforge.config.base import leaves
from smolforge.device import MIN_SPEEDUP
from smolforge.device.environment import find_slowdowns
from smolforge.device.peak_flops import find_published_peak
from smolforge.models.stats import parameter_counts
from smolforge.runs.auto import BUSY_TOKENS, WORTH_COMPILING_SECONDS

MIN_STEPS = 5
"""Fewer, after the first, are chance."""
MAX_DATA_SHARE = 0.05
"""Healthy runs wait a thousandth of their time: batches are read ahead."""
MAX_PAUSE_SHARE = 0.05
"""Of one kind. The recipes' own intervals come to 1 or 2 %."""
TOLERABLE_SHARE = 0.02
"""What an interval is proposed for."""
MAX_OPTIMIZER_SHARE = 0.25
"""AdamW takes some 5 % of a step of a usual batch, Muon 9 to 12 % of nano's: docs/performance.md."""
SLOW_STEP_FACTOR, EVEN_STEP_FACTOR, MIN_LOST_SHARE = 2.0, 1.25, 0.05
"""Steps are uneven where one in twenty takes twice the median, and time beyond a quarter more than it adds up."""
SLOWDOWN_FACTOR, MIN_SLOWDOWN_STEPS = 1.25, 40
"""The last quarter's median step over the first's; steps differ by a tenth for no reason at all."""
MIN_FIRST_STEP_SECONDS, MIN_FIRST_STEP_SHARE = 30, 0.10
"""What a first step takes longer than others, and its share of the run as it is planned."""
LONG_RUN_FACTOR = 2
"""The time a run takes is foreseen within a factor of two: so many times as long as is worth compiling is sure."""
COMPILE_GAIN = 0.05
"""What a compiled program gains, measured on a processor: docs/performance.md."""
TINY_BATCH_FACTOR = 8
"""A micro-batch is tiny where it is so many times smaller than what keeps the device busy."""
BUSY_GPU_PERCENT = 80
"""Per cent of the time; a GPU that is fed has 95 and more."""
MIN_OTHER_CORES = 0.5
"""Cores that other programs keep busy, in the median, before they are worth a sentence."""
TYPICAL_MFU = {
    "cpu": (1_000_000, 0.40, "0.4 to 0.8, as nano has in bfloat16 and SmolLM2-135M in fp32"),
    "cuda": (100_000_000, 0.40, "0.4 to 0.6 for 100M parameters and more, as llm.c has on A100"),
}
"""For so many parameters and more: what is usual, in words too. Smaller ones on a GPU are nowhere near, and may be."""
LOW_MFU_FACTOR = 0.5
"""Of what is usual."""


class Bottleneck(NamedTuple):
    share: float
    """Of the time, that it costs as far as is known."""
    message: str


def diagnose(
    records: Sequence[Record], recipe: Recipe, start: Record, *, fastest_dtype: str | None = None
) -> list[str]:
    """Why the run's last start is slow, in sentences; one that says where the time goes if nothing stands out.

    `start` is its entry in environment.json, `{}` if there is none; `fastest_dtype` that of its machine, where known.
    What hurts in the environment comes first: it spoils every other figure, and costs nothing to change.
    """
    lines = records_of_start(records, start)
    steps = timed_steps(lines)
    warnings = [f"{warning}." for warning in environment_warnings(start, lines)]
    if len(steps) <= MIN_STEPS:
        count_message = f"{len(steps)} steps of the last start say how long they took"
        return [*warnings, f"{count_message}; {MIN_STEPS + 1} would tell where the time goes."]
    run = RunTimings(recipe, start, lines, steps[0], steps[1:], phase_shares(steps[1:]), fastest_dtype)
    bottlenecks = sorted(
        (bottleneck for check in CHECKS for bottleneck in check(run)), key=lambda bottleneck: -bottleneck.share
    )
    return [*warnings, *(bottleneck.message for bottleneck in bottlenecks)] or [
        f"Nothing stands out: {describe_shares(run.shares)}."
    ]


def environment_warnings(start: Record, lines: Sequence[Record]) -> list[str]:
    """What hurts in a start's surroundings; other programs are told by what was measured, where it was."""
    environment = dict(start.get("seen") or {})
    if any("machine_cpu_percent" in line for line in lines):
        environment.pop("load", None)
    threads, ranks = finite_number(start, "threads"), finite_number(start, "ranks")
    return find_slowdowns(environment, int(threads), str(start.get("device")), ranks=int(ranks or 1)) if threads else []


def check_data(run: RunTimings) -> Iterator[Bottleneck]:
    share, workers = run.shares["data"], run.recipe.data.num_workers
    hint = f"--data.num-workers {max(2, 2 * workers)} reads further ahead (it is {workers})"
    if share >= MAX_DATA_SHARE:
        message = f"Waiting for data takes {format_percent(share)} of the time; {hint}, and a faster disk gives more."
        yield Bottleneck(share, message)


def check_pauses(run: RunTimings) -> Iterator[Bottleneck]:
    """Each kind of what happens between steps, by itself where that can be told."""
    for cost in pause_costs(run.steps, run.recipe):
        share = cost.seconds * cost.count / run.total_seconds
        if share >= MAX_PAUSE_SHARE:
            yield Bottleneck(share, pause_message(run, cost, share))


def pause_message(run: RunTimings, cost: PauseCost, share: float) -> str:
    """What it takes, and how to have it less often, or shorter."""
    duration = f"take{'s' * (len(cost.kinds) < 2)} {format_percent(share)} of the time, {cost.seconds:.2g} s"
    if not cost.kinds:
        return (
            f"What is written down after every step {duration} each; fewer trackers (--report.to none) or a faster "
            "disk for the run's folder leave more."
        )
    train, values = run.recipe.train, leaves(run.recipe)
    pauses = [PAUSE_KINDS[kind] for kind in sorted(cost.kinds)]
    times_rarer = math.ceil(share / TOLERABLE_SHARE)
    intervals = [
        f"--{pause.setting.replace('_', '-')} {(values[pause.setting] or 1) * times_rarer}" for pause in pauses
    ]
    hints = [" and ".join(intervals) + " would be rare enough"]
    if "measured" in cost.kinds:
        hints.append(f"a smaller --train.evaluate-tokens (it is {train.evaluate_tokens or 'all'}) measures less")
    if "saved" in cost.kinds and not train.checkpoint_in_background:
        hints.append("--train.checkpoint-in-background true does not wait for the disk")
    names = " and ".join(pause.description for pause in pauses)
    return f"{names.capitalize()} {duration} each of {cost.count:,} times; {'; '.join(hints)}."


def check_optimizer(run: RunTimings) -> Iterator[Bottleneck]:
    share, name, batch = run.shares["optimizer"], run.recipe.optim.name, run.recipe.train.batch_tokens
    alternative = ", or --optim.name adamw, whose step costs less than Muon's" if name == "muon" else ""
    if share >= MAX_OPTIMIZER_SHARE:
        yield Bottleneck(
            share,
            f"The optimizer takes {format_percent(share)} of the time, which does not grow with the batch: a new run "
            f"with --train.batch-tokens {4 * batch} (it is {batch}) takes that step for four times the "
            f"tokens{alternative}.",
        )


def check_precision(run: RunTimings) -> Iterator[Bottleneck]:
    """Whether fp32 costs speed: by the peaks of a GPU, or by what was measured where the caller knows the machine."""
    peak = find_published_peak(str(run.start.get("name"))) if run.device == "cuda" else None
    faster_by_spec = peak is not None and (peak.bfloat16 or 0) > MIN_SPEEDUP * peak.float32
    share = run.shares["forward"] + run.shares["backward"]
    if run.recipe.train.dtype == "float32" and (faster_by_spec or run.fastest_dtype == "bfloat16"):
        yield Bottleneck(
            share * (1 - 1 / MIN_SPEEDUP),
            f"Forward and backward, {format_percent(share)} of the time, multiply in float32, and this machine "
            "is clearly faster in bfloat16: a new run with --train.dtype bfloat16.",
        )


def check_compile(run: RunTimings) -> Iterator[Bottleneck]:
    """Hint at compiling where the run is long enough to win back the compiler's time."""
    min_seconds = LONG_RUN_FACTOR * WORTH_COMPILING_SECONDS.get(run.device, math.inf)
    if run.recipe.train.compile is False and run.planned_seconds >= min_seconds:
        yield Bottleneck(
            COMPILE_GAIN,
            f"The program is not compiled, in a start of {run.planned_seconds / 3600:.1f} hours: --train.compile true "
            f"takes a minute or two and gains some {format_percent(COMPILE_GAIN)} on a processor, on a GPU more.",
        )


def check_first_step(run: RunTimings) -> Iterator[Bottleneck]:
    extra_seconds = run.first_step.seconds - statistics.median(run.step_seconds)
    share = extra_seconds / (run.planned_seconds + run.first_step.seconds)
    hint = "--train.compile false is ready at once" if run.recipe.train.compile is True else "a longer run forgets it"
    if extra_seconds >= MIN_FIRST_STEP_SECONDS and share >= MIN_FIRST_STEP_SHARE:
        message = f"The first step took {extra_seconds:.0f} s longer than others, {format_percent(share)} of this start"
        yield Bottleneck(share, f"{message} as it is planned: that is for programs and memory made once; {hint}.")


def check_micro_batches(run: RunTimings) -> Iterator[Bottleneck]:
    """Whether a GPU gets its batch in crumbs."""
    train, busy_tokens = run.recipe.train, BUSY_TOKENS.get(run.device, 0)
    rows_per_rank = max(1, train.sequences_per_step // run.ranks)
    rows = min(train.sequences_per_micro_batch, rows_per_rank)
    tokens, count = rows * train.sequence_length, math.ceil(rows_per_rank / rows)
    larger_rows = min(rows_per_rank, busy_tokens // train.sequence_length)
    peak = run.median("peak_memory_bytes")
    memory_note = f" if memory allows ({peak / 2**30:.1f} GiB are used now)" if peak else ""
    if count > 1 and tokens * TINY_BATCH_FACTOR <= busy_tokens:
        yield Bottleneck(
            run.shares["forward"] + run.shares["backward"],
            f"Each step is {count} micro-batches of {tokens:,} tokens, and a GPU is busy from about {busy_tokens:,}: "
            f"--train.micro-batch-size {larger_rows} (it is {rows}){memory_note}.",
        )


def check_idle_gpu(run: RunTimings) -> Iterator[Bottleneck]:
    gpu_percent = run.median("gpu_percent")
    if gpu_percent is not None and gpu_percent < BUSY_GPU_PERCENT:
        yield Bottleneck(
            1 - gpu_percent / 100,
            f"The GPU has work in {gpu_percent:.0f} % of the time: the processor does not ask for it fast enough. A "
            "larger --train.micro-batch-size makes fewer and larger kernels, --train.compile true makes one of many.",
        )


def check_mfu(run: RunTimings) -> Iterator[Bottleneck]:
    """Share of the device's peak, against what models of this size reach."""
    mfu, parameters = run.median("mfu") or 0.0, sum(parameter_counts(run.recipe.model).values())
    min_parameters, typical, typical_text = TYPICAL_MFU.get(run.device, (math.inf, 0.0, ""))
    if parameters >= min_parameters and 0 < mfu < LOW_MFU_FACTOR * typical:
        yield Bottleneck(
            1 - mfu / typical,
            f"MFU is {mfu:.1%}, and {typical_text}, is usual: the device does less than half of what it could. If "
            "nothing else here explains it, --profile 5 shows where a step's time goes.",
        )


def check_uneven_steps(run: RunTimings) -> Iterator[Bottleneck]:
    seconds = sorted(run.step_seconds)
    median, slow = statistics.median(seconds), seconds[int(0.95 * len(seconds))]
    lost_share = sum(max(0.0, step_seconds - EVEN_STEP_FACTOR * median) for step_seconds in seconds) / run.total_seconds
    if slow >= SLOW_STEP_FACTOR * median and lost_share >= MIN_LOST_SHARE:
        message = f"One step in twenty takes {slow / median:.1f} times the median or longer"
        cause = "other programs, a disk that is slow at times, or a machine that is shared"
        yield Bottleneck(lost_share, f"{message}, which loses {format_percent(lost_share)} of the time: {cause}.")


def check_slowdown(run: RunTimings) -> Iterator[Bottleneck]:
    seconds, quarter = run.step_seconds, max(1, len(run.step_seconds) // 4)
    first_median, last_median = statistics.median(seconds[:quarter]), statistics.median(seconds[-quarter:])
    if len(seconds) >= MIN_SLOWDOWN_STEPS and last_median >= SLOWDOWN_FACTOR * first_median:
        lost_share = max(0.0, sum(seconds) - first_median * len(seconds)) / run.total_seconds
        message = f"Steps take {last_median / first_median:.1f} times as long at the end as at the beginning"
        hint = (
            "nvidia-smi -q -d PERFORMANCE says whether it is"
            if run.device == "cuda"
            else "top shows programs beside it"
        )
        cause = "a device that grows hot and slows down, or other programs"
        yield Bottleneck(lost_share, f"{message}, {format_percent(lost_share)} of the time: {cause}; {hint}.")


def check_cpu_contention(run: RunTimings) -> Iterator[Bottleneck]:
    """Whether other programs had the cores that this one's threads wanted, in the median of what was measured."""
    cores, threads = finite_number(run.start.get("seen") or {}, "machine_cores"), finite_number(run.start, "threads")
    run_percent, machine_percent = run.median("cpu_percent"), run.median("machine_cpu_percent")
    if run.device != "cpu" or run.ranks > 1 or not cores or not threads:
        return
    if run_percent is None or machine_percent is None:
        return
    other_cores = max(0.0, cores * machine_percent - run_percent) / 100
    lost_share, cores_needed = 1 - run_percent / 100 / threads, threads - MIN_OTHER_CORES / 2
    if other_cores >= MIN_OTHER_CORES and cores - other_cores <= cores_needed and lost_share >= MIN_LOST_SHARE:
        yield Bottleneck(
            lost_share,
            f"Other programs keep {other_cores:.1f} of {cores:.0f} cores busy, and this run's {threads:.0f} threads "
            f"got {run_percent / 100:.1f}: {format_percent(lost_share)} of their time is lost; end those programs, or "
            "wait for them.",
        )


CHECKS: tuple[Callable[[RunTimings], Iterator[Bottleneck]], ...] = (
    check_data,
    check_pauses,
    check_optimizer,
    check_precision,
    check_compile,
    check_first_step,
    check_micro_batches,
    check_idle_gpu,
    check_mfu,
    check_uneven_steps,
    check_slowdown,
    check_cpu_contention,
)


def describe_shares(shares: Mapping[str, float]) -> str:
    """Shares in words, those that can be seen, the largest first."""
    names = {"data": "waiting for data", "optimizer": "the optimizer", "other": "the rest of a step"}
    names[BETWEEN] = "what passes between steps"
    visible = sorted(((share, phase) for phase, share in shares.items() if share >= 0.005), reverse=True)
    first, *others = [
        f"{names.get(phase, phase)}{' takes' * (not index)} {format_percent(share)}"
        for index, (share, phase) in enumerate(visible)
    ]
    return ", ".join([f"{first} of the time", *others])


def format_percent(share: float) -> str:
    return f"{100 * share:.0f} %"
