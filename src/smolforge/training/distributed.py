"""Several processes that train one model: which of them this is, and how they exchange data.

    torchrun, srun -> environment -> World: rank r of n -> rank_group -> RankGroup
                                                                           on_rank_zero  rank 0 computes, all receive
                                                                           all_gather    a few integers of every rank
                                                                           all_reduce    losses
                                                                           wrap_ddp      gradients

Each rank computes the gradient of its share of the sequences of a batch; their sum is the gradient of the batch.
Everything else, whatever reads or writes a run's folder or reports to the user, is done by rank 0.

A rank that ends closes its connections, so the others notice at once; one that hangs lets a step's wait time out.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smolforge.errors import ConfigError, FailedOnRankZeroError, LostRankError, MissingResourceError, exit_code_of

LAUNCH = "torchrun --standalone --nproc-per-node 2 -m -- smolforge train RECIPE --run DIR"
JOIN_SECONDS = 300
"""How long ranks wait for each other to begin: the slowest has torch to load over a network."""
RANK0_TIMEOUT = timedelta(days=30)
"""How long the others wait while rank 0 prepares, measures or saves. Should it die, they hear of it at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    meeting: str = ""
    """`host:port` of rank 0, where they find each other."""


def world_from_env(environment: Mapping[str, str]) -> World:
    """Return the rank that torchrun, or srun without it, gave this process; without either it is alone.

    Raises ConfigError where the environment contradicts itself.
    """
    env = environment if {"RANK", "WORLD_SIZE"} & environment.keys() else slurm_env(environment)
    if env is None:
        return World()
    numbers = {"LOCAL_RANK": 0}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        value = env.get(name)
        if value is None and name not in numbers:
            raise ConfigError(f"the environment has no {name}, but the rest of a launcher's; start with: {LAUNCH}")
        if value is not None and not re.fullmatch(r"[0-9]{1,9}", value):
            raise ConfigError(f"{name} in the environment is {value!r}, which is no number; start with: {LAUNCH}")
        numbers[name] = int(value or 0)
    world = World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], rank_zero_address(env))
    if world.rank >= world.size:
        raise ConfigError(f"RANK is {world.rank} and WORLD_SIZE {world.size}; ranks count from 0; start with: {LAUNCH}")
    if world.size > 1 and not world.meeting:
        raise ConfigError(
            f"WORLD_SIZE is {world.size}, but MASTER_ADDR and MASTER_PORT do not say where the ranks meet; "
            f"start with: {LAUNCH}"
        )
    return world


def rank_zero_address(env: Mapping[str, str]) -> str:
    """Return `host:port` of rank 0, or an empty string where the environment has none."""
    host, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    return f"{host}:{port}" if host and re.fullmatch(r"[0-9]{1,5}", port) and int(port) < 1 << 16 else ""


def slurm_env(environment: Mapping[str, str]) -> Mapping[str, str] | None:
    """Return a Slurm step's tasks as torchrun's variables; None outside of a step, or where it has one task.

    A batch script has SLURM_NTASKS as well, but is no step: what runs in it without srun is alone.
    """
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1" or "SLURM_PROCID" not in environment:
        return None
    nodes = re.match(r"([^,\[]+)(?:\[([0-9]+))?", environment.get("SLURM_STEP_NODELIST", ""))  # node[003-005],other
    job = environment.get("SLURM_JOB_ID", "0")
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or (f"{nodes[1]}{nodes[2] or ''}" if nodes else ""),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + int(job) % 10_000),
    }


class RankGroup:
    """The processes of one run, as one of them sees it. A single process does everything and waits for nobody."""

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self.local_rank = world.local_rank if world.size > 1 else None
        self.seconds, self.on_gpu = 0, False
        self.group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides, writes and reports."""
        return self.rank == 0

    def start(self, device: torch.device, seconds: int) -> None:
        """Connect for steps on a device. A step in which a rank waits for `seconds` ends the run."""
        if self.size == 1:
            return
        self.seconds, self.on_gpu = seconds, device.type == "cuda"
        if self.on_gpu:
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if self.on_gpu else "gloo"
        group = dist.new_group(backend=backend, timeout=timedelta(seconds=seconds))
        assert isinstance(group, dist.ProcessGroup)
        self.group = group

    def rows_of_rank(self, rows: int) -> range:
        """Return this rank's share of a batch's rows: contiguous, as long as the others' or longer by one."""
        return range(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def on_rank_zero(self, work: Callable[..., T], *args: Any) -> T:
        """Call `work(*args)` on rank 0 alone, and return its result on every rank: plain data, sent as JSON.

        The other ranks wait as long as it takes. What it raises ends them all: there as FailedOnRankZeroError.
        """
        if self.size == 1:
            return work(*args)
        if self.is_main:
            try:
                result = work(*args)
            except Exception as error:
                self._broadcast(json.dumps({"error": str(error), "exit_code": exit_code_of(error)}))
                raise
            self._broadcast(json.dumps({"answer": result}))
            return result
        message = json.loads(self._broadcast(""))
        if "error" in message:
            raise FailedOnRankZeroError(message["error"], message["exit_code"])
        return message["answer"]

    def _broadcast(self, text: str) -> str:
        """Return rank 0's text on every rank, once all have it."""
        texts = [text]
        dist.broadcast_object_list(texts, 0)
        dist.barrier()  # rank 0 may be about to end
        return texts[0]

    def all_gather(self, *numbers: int) -> list[tuple[int, ...]]:
        """Return these integers of every rank, by rank."""
        if self.size == 1:
            return [numbers]
        own = torch.tensor(numbers)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        return [tuple(numbers_of_rank.tolist()) for numbers_of_rank in everyone]

    def all_reduce(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return these numbers summed over all ranks, on their device; nobody waits for a GPU."""
        if self.size == 1:
            return numbers
        sums = torch.stack([number.double() for number in numbers.values()])
        dist.all_reduce(sums, group=self.group)
        return dict(zip(numbers, sums.unbind(), strict=True))

    def wrap_ddp(self, objective: nn.Module) -> nn.Module:
        """Return the objective with rank 0's weights, its gradients summed over all ranks during backward."""
        if self.size == 1:
            return objective
        wrapped = DistributedDataParallel(objective, process_group=self.group, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(self.group, allreduce_hook)
        return wrapped


def allreduce_hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over all ranks. DistributedDataParallel's mean is wrong for ragged labels."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def no_sync(objective: nn.Module) -> AbstractContextManager:
    """Return a context in which gradients stay on their rank: gradient accumulation adds more to them."""
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else nullcontext()


SINGLE_PROCESS = RankGroup(World())


@contextmanager
def rank_group(world: World) -> Iterator[RankGroup]:
    """Connect to the other ranks of the world, and disconnect at the end.

    Raises MissingResourceError where they do not come, LostRankError when one is gone or hangs.
    """
    if world.size == 1:
        yield SINGLE_PROCESS
        return
    rendezvous(world)
    ranks, broken = RankGroup(world), False
    try:
        yield ranks
    except RuntimeError as error:
        broken = is_connection_error(error)
        if broken:
            raise lost_rank_error(ranks, error) from error
        raise
    finally:
        if not (broken and ranks.on_gpu):  # NCCL would wait for the lost one
            dist.destroy_process_group()


def rendezvous(world: World) -> None:
    """Connect all ranks. Raises MissingResourceError where that fails."""
    try:
        store, _, _ = next(
            dist.rendezvous(f"tcp://{world.meeting}", world.rank, world.size, timeout=timedelta(seconds=JOIN_SECONDS))
        )
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=RANK0_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingResourceError(
            f"rank {world.rank} could not meet the other {world.size - 1} at {world.meeting}: {reason}"
        ) from error


def is_connection_error(error: RuntimeError) -> bool:
    """Whether torch reports a broken connection to another rank; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def lost_rank_error(ranks: RankGroup, error: RuntimeError) -> LostRankError:
    """Return the error for a connection that broke or timed out."""
    if "timed out" in str(error).lower():
        reason = (
            f"rank {ranks.rank} heard nothing of another for {ranks.seconds} s (train.rank_timeout_seconds): it hangs"
        )
    else:
        reason = f"rank {ranks.rank} lost the connection to another: that one has ended, and said why if it could"
    return LostRankError(f"{reason}. The same command goes on from the newest checkpoint")
