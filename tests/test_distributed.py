"""Several processes that train one run: the numbers of one, one folder, one end. Four gloo ranks at most, on a CPU."""

import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from children import begin_at_once
from conftest import NANO

from smolforge import cli
from smolforge.checkpoint import training_state
from smolforge.config.base import replace_settings
from smolforge.config.load import to_recipe
from smolforge.data.batches import TokenWindows, iterate_batches
from smolforge.data.corpus import TRAIN, Corpus, Tokens
from smolforge.data.mixture import Mixture
from smolforge.device import pick_device
from smolforge.errors import ConfigError, MissingResourceError
from smolforge.operating_system import SCHEDULER_SIGNALS
from smolforge.runs import run as run_module
from smolforge.runs import train
from smolforge.runs.dataset import build_row_source
from smolforge.runs.estimate import estimate_of_ranks, estimate_run
from smolforge.runs.resolve import check_ranks
from smolforge.testing import sentences, tiny_config, tiny_tokenizer
from smolforge.testing.processes import start, wait_for_exit
from smolforge.training import distributed, loop
from smolforge.training.distributed import SINGLE_PROCESS, RankGroup, World, rank_group, world_from_env
from smolforge.training.objective import Objective
from smolforge.training.run_folder import RunFolder, read_records

Fault = Callable[[int], None]
"""Given to each rank in its process, and told which it is."""


@dataclass
class Bench:
    """A folder with a recipe, and runs in it."""

    folder: Path
    launches: int = 0
    said: list[str] = field(default_factory=list)
    """What each rank of the last launch printed."""

    def __post_init__(self) -> None:
        (self.folder / "text.txt").write_text(sentences(300))
        sources = {"data": {"sources": [str(self.folder / "text.txt")]}}
        (self.folder / "tiny.json").write_text(json.dumps(NANO | sources))

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.json"

    def run(self, name: str) -> Path:
        return self.folder / name

    def start(self, size: int, run: str, faults: list[Fault], settings: dict) -> list[BaseProcess]:
        self.launches += 1
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        words = ["train", str(self.recipe), "--run", str(self.run(run)), *flags]
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "COLUMNS": "300"}
        return [
            start(one_rank, self.output(rank), world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, words, faults)
            for rank in range(size)
        ]

    def train(self, size: int, run: str, *faults: Fault, **settings: object) -> list[int]:
        """Train on so many ranks; returns their exit codes."""
        given = {name.replace("__", "."): value for name, value in settings.items()}
        children = self.start(size, run, list(faults), given)
        codes = [wait_for_exit(child) for child in children]
        self.said = [self.output(rank).read_text() for rank in range(size)]
        return codes

    def output(self, rank: int) -> Path:
        return self.folder / f"said-{self.launches}-{rank}"

    def losses(self, run: str) -> list[float]:
        """Of every step, each there once."""
        records = read_records(self.run(run) / "metrics.jsonl")
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return [record["loss"] for record in records]

    def hashes(self, run: str) -> list[str]:
        files = training_state.check_checkpoint(training_state.list_checkpoints(self.run(run))[-1])["files"]
        return [files[name]["sha256"] for name in ("model.safetensors", "training/optimizer.safetensors")]


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Bench:
    """Two ranks that nothing disturbs, in the run `once`."""
    made = Bench(tmp_path_factory.mktemp("pair"))
    assert made.train(2, "once", train__sample_every=4) == [0, 0], made.said
    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def one_rank(said: Path, environment: dict[str, str], words: list[str], faults: list[Fault]) -> None:
    """What a launcher starts, in this process."""
    begin_at_once()
    os.environ |= environment
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for fault in faults:
        fault(int(environment["RANK"]))
    code = cli.run(words)
    sys.stdout.flush()
    sys.exit(code)


def at(who: int, step: int, act: Callable[[], None], rank: int) -> None:
    """One rank does something when it is about to begin the step that follows so many."""
    launch = loop.train_step

    def launching(*given, **named):
        if rank == who and named["completed"] == step:
            act()
        return launch(*given, **named)

    loop.train_step = launching


def signalled(number: int) -> None:
    os.kill(os.getpid(), number)


def noted(folder: Path, rank: int) -> None:
    """Write down every row this rank learns from, and what its weights are at the end."""
    backward, trained = loop.forward_backward, run_module.train

    def noting(objective, batch, *rest, **options):
        with (folder / f"rows-{rank}").open("ab") as file:
            file.write(batch.input_ids.numpy().tobytes())
        return backward(objective, batch, *rest, **options)

    def training_(objective, *rest, **options):
        end = trained(objective, *rest, **options)
        weights = b"".join(weight.detach().numpy().tobytes() for weight in objective.parameters())
        (folder / f"weights-{rank}").write_text(hashlib.sha256(weights).hexdigest())
        return end

    loop.forward_backward, run_module.train = noting, training_


# The same numbers


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("settings", "rows", "tolerance"),
    [
        pytest.param({}, 5, 1e-6, marks=pytest.mark.long),
        pytest.param(
            {"optim.name": "muon", "optim.ema_decay": 0.3, "train.micro_batch_size": 1}, 4, 1e-6, marks=pytest.mark.long
        ),
        ({"train.dtype": "float64", "train.micro_batch_size": 1}, 6, 1e-12),
    ],
)
def test_ranks_1_2_and_4_train_the_same(bench, settings, rows, tolerance):
    """20 steps over a whole epoch and its ragged end, shares of different length, any number of workers."""
    settings = settings | {"train.steps": 20, "train.batch_tokens": 32 * rows, "train.evaluate_every": "none"}
    run = train(bench.recipe, bench.run("1"), **settings)
    assert len({record["tokens"] for record in read_records(run.folder / "metrics.jsonl")}) == 20
    windows = TokenWindows(Corpus.open(run.folder / "corpus").tokens(TRAIN), 32, run.recipe.seed)
    for size, workers in ((2, 4), (4, 0)):
        note, given = partial(noted, bench.folder), settings | {"data.num_workers": workers}
        assert bench.train(size, str(size), note, **given) == [0] * size, bench.said
        assert bench.losses(str(size)) == pytest.approx(bench.losses("1"), rel=tolerance, abs=0)
        read = [np.fromfile(bench.folder / f"rows-{rank}", np.int64).reshape(20, -1, 32) for rank in range(size)]
        for step, shares in enumerate(zip(*read, strict=True)):
            assert np.array_equal(np.concatenate(shares), windows.batch(step, rows).input_ids.numpy())
        assert len({(bench.folder / f"weights-{rank}").read_text() for rank in range(size)}) == 1
        for rank in range(size):
            (bench.folder / f"rows-{rank}").unlink()


def test_ranks_train_a_mixture_like_one_process(bench):
    """Rows, losses and what is counted, over borders of stages, also where one rank is killed on the way."""
    for name, begin, lines in (("web", 0, 300), ("code", 5000, 8)):
        (bench.folder / f"{name}.txt").write_text(sentences(lines, begin))
    tiny_tokenizer().save(bench.folder / "tokenizer")
    mixture = {name: {"source": str(bench.folder / f"{name}.txt")} for name in ("web", "code")}
    stages = [
        {"until_step": 3, "weights": {"web": 3, "code": 1}},
        {"until_step": 6},
        {"weights": {"web": 1, "code": 9}},
    ]
    tree = NANO | {"tokenizer": str(bench.folder / "tokenizer"), "data": {"mixture": mixture, "stages": stages}}
    bench.recipe.write_text(json.dumps(tree))
    given = {"train.steps": 9, "train.batch_tokens": 32 * 5, "optim.schedule.steps": 9, "train.evaluate_every": "none"}
    alone = train(bench.recipe, bench.run("1"), **given)
    killed = partial(at, 1, 7, partial(signalled, signal.SIGKILL))
    assert bench.train(2, "2", killed, partial(noted, bench.folder), **given)[1] == -signal.SIGKILL
    assert bench.train(2, "2", **given, **{"data.num_workers": 3}) == [0, 0], bench.said
    rows = build_row_source(Mixture.open(bench.run("2")), alone.recipe)
    sizes = [len(RankGroup(World(rank, 2)).rows_of_rank(5)) for rank in range(2)]
    read = [np.fromfile(bench.folder / f"rows-{n}", np.int64).reshape(-1, size, 32)[:7] for n, size in enumerate(sizes)]
    for step, shares in enumerate(zip(*read, strict=True)):
        assert np.array_equal(np.concatenate(shares), rows.batch(step, 5).input_ids.numpy())
    assert bench.losses("2") == pytest.approx(bench.losses("1"), rel=1e-6, abs=0)
    one, two = (
        [[each[key] for key in ("stage", "tokens", "tokens_from_web", "tokens_from_code")] for each in found]
        for found in (read_records(bench.run(name) / "metrics.jsonl") for name in ("1", "2"))
    )
    assert one == two
    assert [each[0] for each in one] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_rank_rows_join_to_the_batch(size, workers):
    windows = TokenWindows(Tokens([np.arange(1000)]), 16, seed=5)
    shares = [RankGroup(World(rank, size)).rows_of_rank(5) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for number, parts in enumerate(
        zip(*(iterate_batches(windows, range(30), 5, num_workers=workers, share=each) for each in shares), strict=True)
    ):
        assert torch.equal(torch.cat([part.input_ids for part in parts]), windows.batch(number, 5).input_ids)
        assert torch.equal(torch.cat([part.labels for part in parts]), windows.batch(number, 5).labels)


def test_moe_aux_loss_is_the_same_on_every_rank_count(bench):
    model = tiny_config(model_type="mixtral", num_local_experts=8, num_experts_per_tok=1).model_dump()
    recipe = json.loads(bench.recipe.read_text()) | {"model": model}
    bench.recipe.write_text(json.dumps(recipe))
    train(bench.recipe, bench.run("1"), **{"train.micro_batch_size": 1})
    assert bench.train(2, "2", train__micro_batch_size=1) == [0, 0], bench.said
    assert bench.losses("2") == pytest.approx(bench.losses("1"), rel=1e-6)
    balance = [read_records(bench.run(name) / "metrics.jsonl")[-1]["balance_loss"] for name in ("1", "2")]
    assert balance[0] == pytest.approx(balance[1], rel=1e-5)
    experts = to_recipe(recipe)
    check_ranks(replace_settings(experts, {"train.micro_batch_size": 2}), 2)
    for micro, size in ((None, 2), (3, 2), (2, 4)):
        with pytest.raises(ConfigError, match=f"the {size} ranks needs a whole number of such micro-batches of the 4"):
            check_ranks(replace_settings(experts, {"train.micro_batch_size": micro}), size)


def test_run_estimate_counts_all_ranks(pair):
    first = json.loads((pair.run("once") / "environment.json").read_text())[0]
    assert first["ranks"] == 2
    recipe = replace_settings(to_recipe(NANO), {"train.batch_tokens": 32 * 100})
    alone, together = estimate_run(recipe), estimate_of_ranks(recipe, 0, 4)
    assert together.memory_bytes < alone.memory_bytes
    assert together.device == "4 x cpu"
    assert together.tokens == alone.tokens
    assert run_module.step_cost(recipe, torch.device("cpu"), 4).devices == 4


# One folder


def test_rank_0_alone_writes_and_prints(pair):
    run = pair.run("once")
    assert [record["step"] for record in read_records(run / "samples.jsonl")] == [4, 8]
    assert (run / "run.log").read_text().count("saved step-00000004") == 1
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == list(range(1, 9))
    assert "step 8/8" in pair.said[0]
    assert "2 x cpu" in pair.said[0]
    assert pair.said[1] == ""


def test_checkpoints_resume_on_another_number_of_ranks(bench):
    whole = {"optim.schedule.steps": 9}
    train(bench.recipe, bench.run("once"), steps=9, **whole)
    for size, steps in ((2, 3), (1, 5), (4, 7), (2, 9)):
        assert bench.train(size, "run", **whole, **{"train.steps": steps}) == [0] * size, bench.said
        warned = "ranks changed since the last start: the run goes on to rounding, not to the bit" in bench.said[0]
        assert warned == (steps > 3)
    assert bench.losses("run") == pytest.approx(bench.losses("once"), rel=1e-6)
    starts = json.loads((bench.run("run") / "environment.json").read_text())
    assert [(each["step"], each["ranks"]) for each in starts] == [(0, 2), (3, 1), (5, 4), (7, 2)]


def test_init_moments_reach_every_rank(bench):
    train(bench.recipe, bench.run("first"))
    given = {"init_from": str(bench.run("first")), "train.evaluate_every": "none"}
    train(bench.recipe, bench.run("1"), **given, init_moments=True)
    train(bench.recipe, bench.run("fresh"), **given)
    assert bench.train(2, "2", partial(noted, bench.folder), **given, init_moments="true") == [0, 0], bench.said
    assert bench.losses("2") == pytest.approx(bench.losses("1"), rel=1e-6, abs=0)
    assert bench.losses("2")[1] != pytest.approx(bench.losses("fresh")[1], rel=1e-4)
    assert (bench.folder / "weights-0").read_text() == (bench.folder / "weights-1").read_text()


def test_rank_0_error_ends_all_ranks_with_one_message(bench):
    with RunFolder.open(bench.run("run")):
        assert bench.train(2, "run") == [2, 2]
    assert f"is being trained by process {os.getpid()}" in bench.said[0]
    assert bench.said[1] == ""
    assert bench.train(2, "run", train__batch_tokens=32) == [2, 2]
    assert "is 1 rows of train.sequence_length, and 2 ranks need one each; start at most 1" in bench.said[0]
    assert bench.said[1] == ""


# One end


@pytest.mark.parametrize(
    ("size", "who", "number", "code"),
    [
        (2, 1, SCHEDULER_SIGNALS[0], 75),
        pytest.param(2, 0, signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param(4, 2, signal.SIGTERM, 75, marks=pytest.mark.long),
    ],
)
def test_signal_to_one_rank_saves_once_and_ends_all(pair, size, who, number, code):
    run = f"{number.name}"
    assert pair.train(size, run, partial(at, who, 5, partial(signalled, number))) == [code] * size, pair.said
    assert f"stopped by {number.name} after step 6, everything is saved" in pair.said[0]
    assert pair.said[1:] == [""] * (size - 1)
    log = (pair.run(run) / "run.log").read_text()
    assert [log.count(f"saved step-0000000{step}") for step in range(9)] == [0, 0, 0, 0, 1, 0, 1, 0, 0]
    assert pair.train(2, run, train__sample_every=4) == [0, 0]
    assert pair.losses(run) == pytest.approx(pair.losses("once"), rel=1e-6)
    if size == 2:
        assert pair.hashes(run) == pair.hashes("once")


@pytest.mark.parametrize(("size", "who"), [(2, 1), (4, 0)])
def test_killed_rank_ends_the_others(pair, size, who):
    run = f"dead-{who}"
    codes = pair.train(size, run, partial(at, who, 6, partial(signalled, signal.SIGKILL)))
    assert codes == [-signal.SIGKILL if rank == who else 4 for rank in range(size)], pair.said
    for rank in set(range(size)) - {who}:
        *_, last = pair.said[rank].splitlines()
        assert last == (
            f"smolforge: rank {rank} lost the connection to another: that one has ended, and said why if it could. "
            "The same command goes on from the newest checkpoint"
        )
    train(pair.recipe, pair.run(run))
    assert pair.losses(run) == pytest.approx(pair.losses("once"), rel=1e-6)


def test_hanging_rank_ends_the_others(bench):
    fault = partial(at, 1, 5, partial(signalled, signal.SIGSTOP))
    first, second = bench.start(2, "run", [fault], {"train.rank_timeout_seconds": 1})
    assert wait_for_exit(first) == 4
    assert "heard nothing of another for 1 s (train.rank_timeout_seconds): it hangs" in bench.output(0).read_text()
    second.kill()
    wait_for_exit(second)


def poisoned(who: int, losses: tuple[int, ...], gradients: tuple[int, ...], rank: int) -> None:
    """On one rank, these micro-batches, counted as they come, lose what is no number, before or after backward."""
    if rank != who:
        return
    forward, backward, count = Objective.forward, loop.forward_backward, iter(range(10**6))
    number = 0

    def losing(self, *batch):
        nonlocal number
        number = next(count)
        found = forward(self, *batch)
        return found if number not in gradients else {name: value * float("nan") for name, value in found.items()}

    def after(*given, **options):
        found = backward(*given, **options)
        return found if number not in losses else {name: value * float("nan") for name, value in found.items()}

    Objective.forward, loop.forward_backward = losing, after


def test_non_finite_loss_on_one_rank_is_skipped_on_all(bench):
    """A loss alone, then three in a row whose gradients are none either: back to the checkpoint, on with other data."""
    settings = {"train.steps": 12, "train.evaluate_every": "none"}
    faults = [partial(poisoned, 1, (2,), (5, 6, 7)), partial(noted, bench.folder)]
    assert bench.train(2, "run", *faults, **settings) == [0, 0], bench.said
    found = [(each["kind"], each["step"]) for each in read_records(bench.run("run") / "incidents.jsonl")]
    assert found == [("skip", 3), ("skip", 6), ("skip", 7), ("skip", 8), ("rewind", 8)]
    records = read_records(bench.run("run") / "metrics.jsonl")
    assert [record["batch"] for record in records] == [0, 1, 2, 3, *range(8, 16)]
    assert [record["step"] for record in records if "left_out" in record] == [3]
    assert (bench.folder / "weights-0").read_text() == (bench.folder / "weights-1").read_text()


def test_too_many_rewinds_end_all_ranks(bench):
    faults = [partial(poisoned, 1, (), tuple(range(4, 100)))]
    assert bench.train(2, "run", *faults, **{"guard.max_rewinds": 1}) == [1, 1]
    assert "It was taken back 1 times before" in bench.said[0]
    assert bench.said[1] == ""


# Meeting


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_JOB_ID": "4210042",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu-[017-018,31],cpu4",
}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World()),
        (TORCHRUN, World(1, 4, 1, "node7:29500")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World()),
        (TORCHRUN | STEP, World(1, 4, 1, "node7:29500")),
        (STEP, World(9, 16, 1, "gpu-017:20042")),
        (STEP | {"SLURM_STEP_NODELIST": "alpha,beta"}, World(9, 16, 1, "alpha:20042")),
        (STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}, World(9, 16, 1, "10.0.0.1:1234")),
        ({name: value for name, value in STEP.items() if "STEP" not in name}, World()),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World()),
    ],
)
def test_world_from_env_reads_torchrun_and_slurm(environment, world):
    assert world_from_env(environment) == world


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"WORLD_SIZE": None}, "the environment has no WORLD_SIZE, but the rest of a launcher's"),
        ({"RANK": None}, "the environment has no RANK"),
        ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE 4; ranks count from 0"),
        ({"RANK": "-1"}, "RANK in the environment is '-1', which is no number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK in the environment is ''"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR and MASTER_PORT do not say where the ranks meet"),
        ({"MASTER_PORT": "99999"}, "MASTER_ADDR and MASTER_PORT do not say where"),
    ],
)
def test_world_from_env_refuses_contradictions(changes, said, bench, monkeypatch, capsys):
    """With the line to use."""
    for name, value in (TORCHRUN | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert cli.run(["train", str(bench.recipe), "--run", str(bench.run("run"))]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert f"start with: {distributed.LAUNCH}" in shown
    assert not bench.run("run").exists()


def test_ranks_need_one_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="no GPU for local rank 1: this process sees 1, and each rank needs its own"):
        pick_device("auto", 1)
    for name in ("mps", "cuda:1"):
        with pytest.raises(ConfigError, match=f"device is '{name}'; where several ranks train, it should be auto, cpu"):
            pick_device(name, 0)
    assert pick_device("cpu", 1) == torch.device("cpu")


def test_rendezvous_times_out(monkeypatch):
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 1)
    meeting = f"localhost:{free_port()}"
    with (
        pytest.raises(MissingResourceError, match=f"rank 0 could not meet the other 1 at {meeting}: "),
        rank_group(World(0, 2, 0, meeting)),
    ):
        pass


def test_single_process_needs_no_communication():
    with rank_group(World()) as alone:
        assert alone is SINGLE_PROCESS
    assert alone.on_rank_zero(lambda: 3) == 3
    assert alone.all_gather(1, 2) == [(1, 2)]
    assert alone.local_rank is None
