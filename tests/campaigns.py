"""Campaigns against a run: whatever happens to it, it must end as if nothing had.

    a tiny recipe -> its outcome undisturbed -> faults, and starts of the same command until it ends -> the same outcome

Each campaign is a function of a bench, a count and a source of chance. It returns one line of counts, and raises
Lost where something did not hold. `python tests/campaigns.py [--count NAME=NUMBER] [NAME...]` runs the long form.
"""

import argparse
import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from children import begin_at_once
from safetensors import SafetensorError
from safetensors.torch import load_file

from smolforge import atomic, cli
from smolforge.checkpoint import loading, training_state
from smolforge.errors import InvalidFileError
from smolforge.operating_system import SCHEDULER_SIGNALS
from smolforge.testing import damage, power, sentences, tiny_config
from smolforge.testing.disk import (
    EVERY_KIND,
    NEED_SPACE,
    Kind,
    Trace,
    crashing,
    failing,
    folder_content,
    recorded,
    renaming_by_copies,
)
from smolforge.testing.processes import (
    die,
    in_child,
    on_small_disk,
    paused,
    send_when,
    start,
    wait_for_exit,
    wait_until,
)
from smolforge.training.run_folder import read_records

OPTIM = {"learning_rate": 3e-3, "schedule": {"warmup_steps": 2, "decay": "linear", "final_learning_rate": 3e-4}}
TRAIN = {
    "steps": 24,
    "sequence_length": 32,
    "batch_tokens": 128,
    "dtype": "float32",
    "checkpoint_every": 1,
    "evaluate_every": "none",
    "sample_every": "none",
}
ROWS = 4
BATCH = 64
CHECKPOINTS = "checkpoints"
IN_MEMORY = Path("/dev/shm")
"""Where a sync costs nothing, on Linux."""
HASHED = ("model.safetensors", "training/optimizer.safetensors")
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, **dict.fromkeys(SCHEDULER_SIGNALS, 75)}
Fault = Callable[[], AbstractContextManager[Any]]


class Lost(AssertionError):
    """Something that should have survived did not."""


def hold(truth: bool, said: str) -> None:
    if not truth:
        raise Lost(said)


@dataclass(frozen=True)
class Outcome:
    """What two runs have in common that are equal to the bit."""

    hashes: dict[str, str]
    losses: list[tuple[int, float]]
    samples: list[int]

    @classmethod
    def of(cls, run: Path) -> "Outcome":
        files = atomic.check_manifest(training_state.list_checkpoints(run)[-1])["files"]
        records = read_records(run / "metrics.jsonl")
        batches = [record.get("batch", record["step"] - 1) for record in records]
        return cls(
            {name: files[name]["sha256"] for name in HASHED},
            [(record["step"], record["loss"]) for record in records],
            [batch * ROWS + row for batch in batches for row in range(ROWS)],
        )


@dataclass(frozen=True)
class Bench:
    """A folder to work in, a recipe, and what comes of it undisturbed."""

    folder: Path
    recipe: Path
    steps: int
    goal: Outcome
    seconds: float
    """How long a run takes once its folder is locked."""
    mirrors: bool = False
    """Whether each run has a mirror next to it."""
    lost: list[str] = field(default_factory=list)
    """What should have survived and did not."""

    @classmethod
    def set_up(cls, folder: Path, **train: Any) -> "Bench":
        folder.mkdir(parents=True, exist_ok=True)
        text, recipe, settings = folder / "text.txt", folder / "recipe.json", TRAIN | train
        text.write_text(sentences(300))
        optim = OPTIM | {"schedule": OPTIM["schedule"] | {"steps": settings["steps"]}}
        whole = {"model": tiny_config(num_hidden_layers=1).model_dump(), "optim": optim, "train": settings, "seed": 3}
        recipe.write_text(json.dumps(whole | {"data": {"sources": [str(text)]}}))
        begun = cls(folder, recipe, settings["steps"], Outcome({}, [], []), 0.0)
        child = begun.start(folder / "undisturbed")
        begun.wait_for_lock(child, folder / "undisturbed")
        started = time.perf_counter()
        hold(wait_for_exit(child) == 0, begun.said(folder / "undisturbed"))
        seconds, goal = time.perf_counter() - started, Outcome.of(folder / "undisturbed")
        hold([step for step, _ in goal.losses] == list(range(1, begun.steps + 1)), "a step is missing")
        hold(goal.samples == list(range(begun.steps * ROWS)), "a sample is missing, or there twice")
        return cls(folder, recipe, settings["steps"], goal, seconds)

    def new(self, kind: str) -> Path:
        """A place for a run that nothing is in yet."""
        return Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.folder)) / "run"

    def words(self, run: Path) -> list[str]:
        mirror = ["--train.mirror", str(mirror_of(run))] if self.mirrors else []
        return ["train", str(self.recipe), "--run", str(run), "--train.steps", str(self.steps), "--json", *mirror]

    def start(self, run: Path, fault: Fault = nullcontext) -> BaseProcess:
        """The command that trains, in a process of its own, with a fault that waits for it."""
        return start(command, Path(f"{run}.said"), self.words(run), fault)

    def said(self, run: Path) -> str:
        """What the last command printed."""
        return Path(f"{run}.said").read_text()

    def wait_for_lock(self, child: BaseProcess, run: Path) -> None:
        wait_until((run / ".lock").is_file, child)

    def run_all(self, runs: Sequence[Path], faults: Sequence[Fault]) -> list[int]:
        """The command for each of several runs, one after the other in one process; their exit codes."""
        cases = [(Path(f"{run}.said"), self.words(run), fault) for run, fault in zip(runs, faults, strict=True)]
        hold(in_child(commands, cases) == 0, f"the process that ran {runs} ended early")
        return [int(Path(f"{run}.said.code").read_text()) for run in runs]

    def finish(self, *cases: tuple[Path, str]) -> None:
        """The same command once more, with nothing in its way: the outcome is that of an undisturbed run.

        A case is a run and what happened to it.
        """
        runs = [run for run, _ in cases]
        for (run, after), code in zip(cases, self.run_all(runs, [nullcontext] * len(runs)), strict=True):
            with self.noting(after, run):
                hold(code == 0, f"the next start ended with {code}: {self.said(run)}")
                self.compare(run)

    @contextmanager
    def noting(self, after: str, run: Path) -> Iterator[None]:
        """Go on where something did not hold, so that one hears of all of it."""
        try:
            yield
        except (Lost, InvalidFileError) as lost:
            self.lost.append(f"{after}: {lost}")
        shutil.rmtree(run.parent)

    def compare(self, run: Path) -> None:
        """The outcome of a run is that of an undisturbed one."""
        found = Outcome.of(run)
        for what in ("losses", "samples", "hashes"):
            hold(vars(found)[what] == vars(self.goal)[what], f"{what} are not those of a whole run")


def mirror_of(run: Path) -> Path:
    return run.with_name("mirror")


def command(output: Path, words: list[str], fault: Fault) -> None:
    """A command line in this process, its words going to a file."""
    begin_at_once()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with fault():
        code = cli.run(words)
    Path(f"{output}.code").write_text(str(code))
    sys.stdout.flush()
    sys.exit(code)


def commands(cases: Sequence[tuple[Path, list[str], Fault]]) -> None:
    for case in cases:
        with suppress(SystemExit):
            command(*case)


def some(cases: Sequence[Any], count: int | None, chance: random.Random) -> Sequence[Any]:
    """All of them, or so many picked by chance."""
    return cases if count is None else chance.sample(cases, count)


def batches(cases: Sequence[Any], what: str) -> Iterator[Sequence[Any]]:
    """A few dozen at a time, so that one sees it live and no disk fills."""
    for first in range(0, len(cases), BATCH):
        if first:
            print(f"{what}: {first} of {len(cases)}", file=sys.stderr, flush=True)
        yield cases[first : first + BATCH]


# Kills


def saving(run: Path, since: float) -> bool:
    """Whether a save is under way that was begun since a time, or was when the run died."""
    for begun in run.glob("checkpoints/.tmp-step-*"):
        with suppress(FileNotFoundError):  # it is whole now
            if begun.stat().st_mtime > since:
                return True
    return False


def somewhere(bench: Bench, run: Path, chance: random.Random) -> float:
    """A moment in what is left of a run, in seconds from now."""
    done = max(map(training_state.step_from_dir, training_state.list_checkpoints(run)), default=0)
    return chance.uniform(0, bench.seconds * (1 - done / bench.steps) + 0.2)


def send_anywhere(bench: Bench, run: Path, number: int, chance: random.Random) -> tuple[int, bool]:
    """Start a run and send it a signal at any moment, three times of four in the next save.

    Returns its exit code, and whether it ended inside a save.
    """
    child, started = bench.start(run), time.time()
    bench.wait_for_lock(child, run)
    delay = somewhere(bench, run, chance)
    if chance.random() < 1 / 4:
        code = send_when(child, number, lambda: True, delay=delay)
    else:
        time.sleep(delay / 2)
        code = send_when(child, number, partial(saving, run, started), delay=chance.uniform(0, 0.002))
    return code, saving(run, started)


def kills(bench: Bench, count: int | None, chance: random.Random) -> str:
    """kill -9 at any moment, of runs that are started again until they end."""
    count, killed, inside, runs = count or 1, 0, 0, 0
    while killed < count:
        run, code = bench.new("killed"), -signal.SIGKILL
        while killed < count and code != 0:
            code, cut_short = send_anywhere(bench, run, signal.SIGKILL, chance)
            hold(code in (0, -signal.SIGKILL), f"a run that was killed before ended with {code}: {bench.said(run)}")
            killed += code != 0
            inside += cut_short
        bench.finish((run, "kill -9"))
        runs += 1
        print(f"kills: {killed} of {count}", file=sys.stderr, flush=True)
    hold(3 * inside >= killed or killed < 100, f"only {inside} of {killed} were inside a save")
    return f"kills: {killed} killed ({inside} inside a save) in {runs} runs; all equal to the bit, every sample once"


# Crashes and power cuts, at every operation


def record(bench: Bench, disk: Path) -> Trace:
    """The operations of a run in two starts, in this process. What they leave is held to what the trace says."""
    from smolforge.runs import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    disk.mkdir()
    with recorded(disk) as trace:
        train(bench.recipe, disk / "run", steps=bench.steps // 2)
        train(bench.recipe, disk / "run", steps=bench.steps)
    torch.set_num_threads(threads)
    power.after_power_loss(trace, len(trace.operations), disk.with_name("replayed"), persist=power.all_kept)
    hold(
        folder_content(disk) == folder_content(disk.with_name("replayed")),
        "something was written that the trace did not see",
    )
    return trace


def crashes(bench: Bench, count: int | None, chance: random.Random) -> str:
    """A run is killed at each of its operations, or at `count` of them; at every other its next start is as well."""
    operations = len(record(bench, bench.new("recorded").with_name("disk")).operations)
    chosen = some(range(operations), count, chance)
    crashed = twice = 0
    for few in batches(chosen, "crashes"):
        cases = []
        for number in few:
            run, torn = bench.new("crashed"), chance.random() < 0.5
            run.mkdir()
            code = wait_for_exit(bench.start(run, partial(crashing, run, number, torn, die=die)))
            again = (
                wait_for_exit(bench.start(run, partial(crashing, run, 3 * number % operations, torn, die=die)))
                if number % 2
                else 0
            )
            hold({code, again} <= {0, -signal.SIGKILL}, f"operation {number}: {bench.said(run)} ({run})")
            crashed, twice = crashed + (code != 0), twice + (again != 0)
            cases.append((run, f"a crash at operation {number}"))
        bench.finish(*cases)
    return f"crashes: at {crashed} of a run's operations, {twice} of them twice; all equal to the bit"


def fates(chance: random.Random) -> list[power.PersistRule]:
    extremes = [power.all_lost, power.names_kept, power.zeros_kept, power.contents_kept]
    return [*extremes, power.random_loss(chance), power.random_loss(chance)]


def power_cuts(bench: Bench, count: int | None, chance: random.Random) -> str:
    """Power fails before each operation of a run, in several ways; or in `count` of all these cases."""
    trace = record(bench, bench.new("recorded").with_name("disk"))
    cases = some([(at, fate) for at in range(1, len(trace.operations) + 1) for fate in fates(chance)], count, chance)
    seen: set[str] = set()
    for few in batches(cases, "power cuts"):
        cut = []
        for at, fate in few:
            disk = bench.new("cut").with_name("disk")
            power.after_power_loss(trace, at, disk, persist=fate)
            if (found := repr(folder_content(disk))) not in seen:
                before = str(trace.operations[at]) if at < len(trace.operations) else "the end"
                cut.append((disk / "run", f"power lost before {before} (operation {at}, {fate.__name__})"))
            seen.add(found)
        bench.finish(*cut)
    return (
        f"power cuts: {len(cases)} at {len(trace.operations)} operations, which left {len(seen)} different disks; "
        "all equal to the bit"
    )


def saves(bench: Bench, count: int | None, chance: random.Random) -> str:
    """Power fails, or the process dies, at each operation of the last save: the old or the new one is there."""
    trace = record(bench, bench.new("recorded").with_name("disk"))
    last = training_state.checkpoint_dir(Path("run"), bench.steps).with_name(f".tmp-step-{bench.steps:08d}")
    first = next(number for number, each in enumerate(trace.operations) if each.path == last)
    operations = range(first, len(trace.operations) + 1)
    cases = some([(at, fate) for at in operations for fate in [power.all_kept, *fates(chance)]], count, chance)
    old = new = 0
    for at, fate in cases:
        disk = bench.new("save").with_name("disk")
        power.after_power_loss(trace, at, disk, persist=fate)
        found = training_state.latest_valid(disk / "run", lambda _: None)
        hold(found is not None, f"no checkpoint is sound after operation {at}, {fate.__name__} ({disk})")
        new += training_state.step_from_dir(found) == bench.steps
        old += training_state.step_from_dir(found) < bench.steps
        shutil.rmtree(disk.parent)
    return f"saves: {len(cases)} cut short; {old} times the checkpoint before is there, {new} times the new one"


# Bad bits


@dataclass(frozen=True)
class Damage:
    """Something done to one file of a checkpoint."""

    name: str
    file: str
    do: Callable[[Path], object]

    def __str__(self) -> str:
        return f"{self.file}, {self.name}"


def damages(checkpoint: Path, older: Path, chance: random.Random) -> Iterator[Damage]:
    """Every kind of damage to every file of a checkpoint, again and again with other bits and lengths."""
    while True:
        for name in [*atomic.check_manifest(checkpoint)["files"], atomic.MANIFEST]:
            size = (checkpoint / name).stat().st_size
            for bit in [chance.randrange(size * 8) for _ in range(4)]:
                yield Damage(f"flipped at bit {bit}", name, partial(damage.flip_bit, bit=bit))
            for left in (0, 1, size // 2, -1, chance.randrange(size)):
                yield Damage(f"cut to {left} bytes", name, partial(damage.truncate, size=left))
            page = chance.randrange(-(-size // damage.PAGE))
            yield Damage(f"zeroed page {page}", name, partial(damage.zero_page, page=page))
            yield Damage("deleted", name, Path.unlink)
            yield Damage("exchanged with another step's", name, partial(shutil.copyfile, older / name))


def means_the_same(path: Path, before: bytes) -> bool:
    """Some files are equal in all steps, some pages are zeros, and white space in a manifest says nothing."""
    try:
        after = path.read_bytes()
        return after == before or (path.name == atomic.MANIFEST and json.loads(after) == json.loads(before))
    except (OSError, ValueError):
        return False


def check_noticed(run: Path, older: Path, spoiled: Damage) -> None:
    """A resume passes over the newest checkpoint, and so does a reader of the model where it would read that file."""
    said: list[str] = []
    hold(
        training_state.latest_valid(run, said.append) == older and len(said) == 1, f"{spoiled}: not noticed by a resume"
    )
    if spoiled.file in (*loading.MODEL_FILES, atomic.MANIFEST):
        hold(loading.resolve_model_path(run) == older, f"{spoiled}: not noticed by a reader of the model")


def bad_bits(bench: Bench, count: int | None, chance: random.Random) -> str:
    """Damage of every kind is done to the newest checkpoint, noticed and undone; each hundredth run goes on with it."""
    run = bench.folder / "undisturbed"
    older, newest = training_state.list_checkpoints(run)[-2:]
    kinds: dict[str, int] = {}
    resumed = 0
    for spoiled in damages(newest, older, chance):
        path = newest / spoiled.file
        before = path.read_bytes()
        spoiled.do(path)
        same = means_the_same(path, before)
        try:
            if not same:
                check_noticed(run, older, spoiled)
                kinds[spoiled.name.split()[0]] = kinds.get(spoiled.name.split()[0], 0) + 1
            if not same and sum(kinds.values()) % 100 == 1:
                copy = bench.new("spoiled")
                shutil.copytree(run, copy)
                bench.finish((copy, str(spoiled)))
                resumed += 1
        finally:
            path.write_bytes(before)
        if sum(kinds.values()) == count:
            break
    named = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    return f"bad bits: {count} damages ({named}), all noticed; {resumed} runs went on from the checkpoint before"


def wrong_names(bench: Bench, count: int | None, chance: random.Random) -> str:
    """Whole checkpoints under the name of another step."""
    for do, left in ((damage.swap, 0), (Path.rename, 1)):
        run = bench.new("renamed")
        shutil.copytree(bench.folder / "undisturbed", run)
        older, newest = training_state.list_checkpoints(run)[-2:]
        do(newest, older if left == 0 else training_state.checkpoint_dir(run, bench.steps + 5))
        found = training_state.latest_valid(run, lambda _: None)
        hold(found in (None, older), f"{do.__name__}: a checkpoint under another step's name is taken for sound")
    return "wrong names: 2 noticed"


def payload_flips(bench: Bench, count: int | None, chance: random.Random) -> str:
    """For comparison: how many flipped bits of weights the safetensors library notices by itself."""
    path = bench.new("flipped").with_name("model.safetensors")
    shutil.copyfile(training_state.list_checkpoints(bench.folder / "undisturbed")[-1] / path.name, path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    noticed = 0
    for _ in range(count or 1):
        bit = chance.randrange(header * 8, path.stat().st_size * 8)
        damage.flip_bit(path, bit)
        try:
            load_file(path)
        except SafetensorError:
            noticed += 1
        damage.flip_bit(path, bit)
    return f"for comparison: of {count} flipped bits of weights safetensors notices {noticed}"


# Full and failing disks

NO_ROOM = r"the disk is full: .* needs [\d,]+ bytes and [\d,]+ are free"


@dataclass(frozen=True)
class Failure:
    """Operations below a place in a run's folder that fail, from one on, so many times."""

    place: str
    after: int
    error: int
    kinds: tuple[Kind, ...]
    times: int | None

    def __str__(self) -> str:
        often = "once" if self.times else "from then on"
        return f"{errno.errorcode[self.error]} {often} at operation {self.after} of {self.place}"

    def fault(self, run: Path) -> Fault:
        return partial(failing, run / self.place, self.after, self.error, kinds=self.kinds, times=self.times)

    def check(self, code: int, said: str) -> None:
        """The run goes on, or says what it needs; of what it does beside saving, it only may not fall over."""
        hold(code in (0, 4) and "Traceback" not in said, f"{self}: ended with {code}: {said}")
        if code == 4 and self.place == CHECKPOINTS:
            words = "could not be written" if self.error == errno.EIO else NO_ROOM
            hold(re.search(words, said) is not None, f"{self}: it says {said!r}")


def failures(trace: Trace) -> Iterator[Failure]:
    """Each operation of saves that can fail, once or from then on; and each other one, once."""
    for kinds, errors in ((NEED_SPACE, (errno.ENOSPC, errno.EDQUOT)), (("write", "sync"), (errno.EIO,))):
        able = [each for each in trace.operations if each.kind in kinds]
        saves = [each for each in able if CHECKPOINTS in each.path.parts[1:-1]]
        for number in range(len(saves)):
            for times in (1, None):
                yield Failure(CHECKPOINTS, number, errors[number % len(errors)], kinds, times)
        for number, operation in enumerate(able):
            if operation not in saves:
                yield Failure(".", number, errors[0], kinds, 1)


def full_disks(bench: Bench, count: int | None, chance: random.Random) -> str:
    """Every operation fails that can; training goes on or says what it needs, and the next start ends it."""
    cases = list(failures(record(bench, bench.new("recorded").with_name("disk"))))
    went_on = refused = 0
    for few in batches(some(cases, count, chance), "full disks"):
        runs = [bench.new("full") for _ in few]
        for run in runs:
            run.mkdir()
        codes = bench.run_all(runs, [each.fault(run) for each, run in zip(few, runs, strict=True)])
        for failure, run, code in zip(few, runs, codes, strict=True):
            failure.check(code, bench.said(run))
            went_on, refused = went_on + (code == 0), refused + (code == 4)
        bench.finish(*[(run, str(failure)) for failure, run in zip(few, runs, strict=True)])
    return f"full disks: {went_on} runs went on, {refused} said what they need; all equal to the bit in the end"


def small_disk(bench: Bench, count: int | None, chance: random.Random) -> str:
    """A real disk that someone else fills while a run is under way, and clears for the next start.

    Raises OSError where no disk may be mounted.
    """
    disk = bench.new("small").with_name("disk")
    disk.mkdir()
    script = """
        "$@" & while kill -0 $! && [ ! -s run/metrics.jsonl ]; do sleep 0.001; done
        cat /dev/zero > ballast; wait $!; echo "ended with $?"; rm ballast
        "$@"; echo "ended with $?"; cp -r run ../run
    """
    words = [*on_small_disk(disk, 64 << 20), "sh", "-c", f"cd {disk} {script}", "sh"]
    train = [sys.executable, "-m", "smolforge", *bench.words(disk / "run")]
    done = subprocess.run([*words, *train], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    codes = re.findall(r"ended with (\d+)", done.stdout)
    hold(
        codes == ["4", "0"] and bool(re.search(NO_ROOM, done.stdout)),
        f"a small disk: ended with {codes}: ...{done.stdout[-800:]}",
    )
    with bench.noting("a small disk", disk):
        bench.compare(disk.with_name("run"))
    return "small disk: a real one filled in the middle of a run; it said what it needs, and ended equal to the bit"


# Signals


def signals(bench: Bench, count: int | None, chance: random.Random) -> str:
    """Signals at any moment, as often in a save; the exit code says which, and the same command goes on."""
    stopped = inside = 0
    for _ in range(count or 1):
        sent, run = chance.choice(list(EXIT_CODES)), bench.new("signalled")
        code, _ = send_anywhere(bench, run, sent, chance)
        over = training_state.checkpoint_dir(run, bench.steps).exists()
        hold(code == EXIT_CODES[sent] or over, f"{sent.name}: ended with {code}: {bench.said(run)} ({run})")
        if code == EXIT_CODES[sent]:
            records = read_records(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
            newest = training_state.latest_valid(run, lambda _: None)
            saved = training_state.step_from_dir(newest) if newest else 0
            hold(saved == len(records), f"{sent.name}: {len(records)} steps were done and {saved} saved ({run})")
            stopped, inside = stopped + 1, inside + (0 < saved < bench.steps)
        bench.finish((run, sent.name))
    return (
        f"signals: {count or 1} sent, {stopped} runs stopped by them ({inside} between steps), the others had ended; "
        "all saved, with the right exit code, and equal to the bit"
    )


def freezes(bench: Bench, count: int | None, chance: random.Random) -> str:
    """A run that stands still keeps its folder, and goes on as if it had not."""
    refused = 0
    for _ in range(count or 1):
        run = bench.new("frozen")
        child = bench.start(run)
        bench.wait_for_lock(child, run)
        time.sleep(chance.uniform(0, bench.seconds / 2))
        assert child.pid is not None
        if child.is_alive():
            with paused(child.pid):
                output = run.with_name("second.said")
                code = in_child(command, output, bench.words(run), nullcontext)
                hold(code == 2 and f"by process {child.pid}" in output.read_text(), f"a second start: {output}")
                refused += 1
        hold(wait_for_exit(child) == 0, f"after it was frozen: {bench.said(run)}")
        with bench.noting("frozen", run):
            bench.compare(run)
    return f"freezes: {refused} runs stopped for a while, a second start refused each time; all equal to the bit"


# Mirrors

MIRROR_ERRORS = (errno.ENOTCONN, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EACCES)
MIRROR_OPERATIONS = 1500
"""Of a start, about."""


@contextmanager
def dying_mirror(mirror: Path, after: int, torn: bool, copies: bool) -> Iterator[None]:
    """The process dies at an operation of its mirror, whose renames may be copies."""
    with crashing(mirror, after, torn, die=die), renaming_by_copies(mirror) if copies else nullcontext():
        yield


@contextmanager
def failing_mirror(mirror: Path, after: int, error: int, times: int | None) -> Iterator[None]:
    """The mirror is out of reach from an operation on, once or for good; or it refuses to sync."""
    kinds: tuple[Kind, ...] = ("sync",) if error == errno.EINVAL else EVERY_KIND
    with failing(mirror, after, error, kinds=kinds, times=times):
        yield


def disturb_mirror(bench: Bench, run: Path, chance: random.Random) -> str:
    """One start of a run with something that happens to it or its mirror. Returns what did, if anything."""
    mirror, after = mirror_of(run), int(MIRROR_OPERATIONS * chance.random() ** 2)
    match chance.choice(["kill", "die", "die", "fail", "fail", "fail", "damage"]):
        case "kill":
            code, _ = send_anywhere(bench, run, signal.SIGKILL, chance)
            hold(code in (0, -signal.SIGKILL), f"ended with {code}: {bench.said(run)}")
            return "kill -9" if code else ""
        case "die":
            copies = chance.random() < 0.5
            fault = partial(dying_mirror, mirror, after, chance.random() < 0.5, copies)
            code = wait_for_exit(bench.start(run, fault))
            hold(code in (0, -signal.SIGKILL), f"died at {after}: ended with {code}: {bench.said(run)}")
            return ("death in a mirror that copies to rename" if copies else "death in a mirror") if code else ""
        case "fail":
            error, times = chance.choice([*MIRROR_ERRORS, errno.EINVAL]), chance.choice([1, 1, None])
            code = wait_for_exit(bench.start(run, partial(failing_mirror, mirror, after, error, times)))
            failed = f"{errno.errorcode[error]} at {after}"
            hold(code in (0, 4) and "Traceback" not in bench.said(run), f"{failed}: {code}: {bench.said(run)}")
            hold(code == 0 or error != errno.EINVAL, f"{failed}: {bench.said(run)}")
            struck = error == errno.EINVAL or re.search("NOT MIRRORED|the mirror", bench.said(run))
            return errno.errorcode[error] if struck else ""
    return damage_mirror(mirror, chance)


def damage_mirror(mirror: Path, chance: random.Random) -> str:
    """A bad disk under the newest copy of several: any file of it, or of its journals."""
    checkpoints = training_state.list_checkpoints(mirror)
    if sum(map(training_state.is_valid, checkpoints)) < 2 or not training_state.is_valid(checkpoints[-1]):
        return ""
    folders = [checkpoints[-1], mirror / "journals" / checkpoints[-1].name]
    path = chance.choice([path for folder in folders for path in folder.rglob("*") if path.is_file()])
    size = path.stat().st_size
    harm = [partial(damage.truncate, size=size // 2), partial(damage.flip_bit, bit=size * 4), Path.unlink]
    chance.choice(harm if size else [Path.unlink])(path)
    return "damage"


def mirrors(bench: Bench, count: int | None, chance: random.Random) -> str:
    """Kills and faults of runs with mirrors, half of which then lose their folder; started again until they end."""
    bench, done = replace(bench, mirrors=True), Counter[str]()
    runs = deleted = 0
    while done.total() < (count or 1):
        run, event = bench.new("mirrored"), ""
        while done.total() < (count or 1) and not ended(bench, run):
            event = disturb_mirror(bench, run, chance)
            done.update([event] if event else [])
            if event and run.exists() and chance.random() < 0.5:
                shutil.rmtree(run)
                deleted += 1
        code = bench.run_all([run], [nullcontext])[0]
        with bench.noting(event, run):
            hold(code == 0, f"the next start ended with {code}: {bench.said(run)}")
            for folder in (run, mirror_of(run)):
                bench.compare(folder)
                hold(all(map(training_state.is_valid, training_state.list_checkpoints(folder))), f"{folder} is damaged")
        runs += 1
        print(f"mirrors: {done.total()} of {count}", file=sys.stderr, flush=True)
    events = ", ".join(f"{number} {name}" for name, number in sorted(done.items()))
    return (
        f"mirrors: {done.total()} kills and faults ({events}) of {runs} runs, whose folder was deleted {deleted} "
        "times; all equal to the bit, here and in the mirror"
    )


def ended(bench: Bench, run: Path) -> bool:
    """Whether a run and its mirror have the last step."""
    folders = [run, mirror_of(run)]
    return all(training_state.checkpoint_dir(folder, bench.steps).exists() for folder in folders)


# All of them


@dataclass(frozen=True)
class Campaign:
    """One of the above, how often it is done in the short and the long form (None: every case), and its runs."""

    run: Callable[[Bench, int | None, random.Random], str]
    short: int | None
    long: int | None
    train: dict[str, Any] = field(default_factory=dict)

    def __call__(self, bench: Bench, count: int | None, chance: random.Random) -> str:
        """The line of counts. Raises Lost, naming what did not hold."""
        bench.lost.clear()
        said = self.run(bench, count, chance)
        hold(not bench.lost, f"{len(bench.lost)} did not hold, such as\n    " + "\n    ".join(bench.lost[:8]))
        return said


FEW_OPERATIONS = {"steps": 4, "checkpoint_every": 2, "keep_last": 1}
CAMPAIGNS = {
    "kills": Campaign(kills, 10, 300),
    "crashes": Campaign(crashes, 4, None, FEW_OPERATIONS),
    "power-cuts": Campaign(power_cuts, 10, None, FEW_OPERATIONS),
    "saves": Campaign(saves, 60, None, FEW_OPERATIONS),
    "bad-bits": Campaign(bad_bits, 101, 1000),
    "wrong-names": Campaign(wrong_names, None, None),
    "payload-flips": Campaign(payload_flips, 20, 1000),
    "full-disks": Campaign(full_disks, 6, None, FEW_OPERATIONS),
    "small-disk": Campaign(small_disk, None, None),
    "signals": Campaign(signals, 4, 50),
    "freezes": Campaign(freezes, 1, 5),
    "mirror": Campaign(mirrors, 12, 200),
}


def main() -> int:
    """Run campaigns in processes of their own, two at a time, or a single one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *CAMPAIGNS], help="which; all by default")
    parser.add_argument("--count", type=int, help="how often")
    parser.add_argument("--seed", type=int, default=0, help="where chance begins")
    asked = parser.parse_args()
    more = [] if asked.count is None else ["--count", str(asked.count)]
    if len(asked.names) != 1:
        here = [sys.executable, __file__, "--seed", str(asked.seed), *more]
        with ThreadPoolExecutor(2) as pool:
            done = pool.map(lambda name: subprocess.run([*here, name], check=False), asked.names or CAMPAIGNS)
            return max(each.returncode for each in done)
    (name,) = asked.names
    chosen, started = CAMPAIGNS[name], time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"smolforge-{name}-", dir=IN_MEMORY if IN_MEMORY.is_dir() else None))
    try:
        bench = Bench.set_up(folder / "bench", **chosen.train)
        logging.getLogger("smolforge").addHandler(logging.NullHandler())
        said = chosen(bench, chosen.long if asked.count is None else asked.count, random.Random(asked.seed))
    except Lost as lost:
        print(f"LOST  {name}: {lost}", flush=True)
        return 1
    shutil.rmtree(folder)
    print(f"{said} ({time.monotonic() - started:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
