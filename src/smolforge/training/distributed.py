"""Several processes that train one model: who they are, and how they hear of each other.

    torchrun, srun -> environment -> World: one of so many -> joined -> Ranks
                                                                        tell      rank 0 does it, all hear the answer
                                                                        gather    a few whole numbers of each
                                                                        sum       losses
                                                                        parallel  gradients

Each rank computes the gradient of its share of the rows of a batch, and their sum is the gradient of the batch. All
else, whatever reads or writes a run's folder or is said to a person, is rank 0's; the others follow.

A rank that ends closes its connections, so the others hear of it at once; one that hangs lets a step's wait run out.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smolforge.errors import Elsewhere, LostRank, MissingResource, SettingError, exit_code_of

LAUNCH = "torchrun --standalone --nproc-per-node 2 -m -- smolforge train RECIPE --run DIR"
JOIN_SECONDS = 300
"""How long ranks wait for each other to begin: the slowest has torch to load over a network."""
PATIENCE = timedelta(days=30)
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


def world_of(environment: Mapping[str, str]) -> World:
    """The place that torchrun, or srun without it, gave this process; without either it is alone.

    Raises SettingError where the environment contradicts itself.
    """
    told = environment if {"RANK", "WORLD_SIZE"} & environment.keys() else of_slurm(environment)
    if told is None:
        return World()
    numbers = {"LOCAL_RANK": 0}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        value = told.get(name)
        if value is None and name not in numbers:
            raise SettingError(f"the environment has no {name}, but the rest of a launcher's; start with: {LAUNCH}")
        if value is not None and not re.fullmatch(r"[0-9]{1,9}", value):
            raise SettingError(f"{name} in the environment is {value!r}, which is no number; start with: {LAUNCH}")
        numbers[name] = int(value or 0)
    world = World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], meeting_of(told))
    if world.rank >= world.size:
        raise SettingError(
            f"RANK is {world.rank} and WORLD_SIZE {world.size}; ranks count from 0; start with: {LAUNCH}"
        )
    if world.size > 1 and not world.meeting:
        raise SettingError(
            f"WORLD_SIZE is {world.size}, but MASTER_ADDR and MASTER_PORT do not say where the ranks meet; "
            f"start with: {LAUNCH}"
        )
    return world


def meeting_of(told: Mapping[str, str]) -> str:
    host, port = told.get("MASTER_ADDR", ""), told.get("MASTER_PORT", "")
    return f"{host}:{port}" if host and re.fullmatch(r"[0-9]{1,5}", port) and int(port) < 1 << 16 else ""


def of_slurm(environment: Mapping[str, str]) -> Mapping[str, str] | None:
    """The tasks of a Slurm step in torchrun's words; None outside of a step, or where it has one task.

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


class Ranks:
    """The processes of one run, seen from one of them. Alone, it does everything by itself and waits for nobody."""

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self.local_rank = world.local_rank if world.size > 1 else None
        self.seconds, self.on_gpu = 0, False
        self.group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides, writes and speaks."""
        return self.rank == 0

    def begin(self, device: torch.device, seconds: int) -> None:
        """Connect for steps on a device; one in which a rank waits for so long ends the run."""
        if self.size == 1:
            return
        self.seconds, self.on_gpu = seconds, device.type == "cuda"
        if self.on_gpu:
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if self.on_gpu else "gloo"
        group = dist.new_group(backend=backend, timeout=timedelta(seconds=seconds))
        assert isinstance(group, dist.ProcessGroup)
        self.group = group

    def share(self, rows: int) -> range:
        """This rank's of the rows of a batch: an unbroken stretch, as long as the others' or longer by one."""
        return range(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def tell(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, the only one that does it: plain data, as JSON brings it to the others.

        They wait as long as it takes. What it raises ends them all: elsewhere as Elsewhere.
        """
        if self.size == 1:
            return work()
        if self.leads:
            try:
                answer = work()
            except Exception as error:
                self._broadcast(json.dumps({"error": str(error), "exit_code": exit_code_of(error)}))
                raise
            self._broadcast(json.dumps({"answer": answer}))
            return answer
        said = json.loads(self._broadcast(""))
        if "error" in said:
            raise Elsewhere(said["error"], said["exit_code"])
        return said["answer"]

    def _broadcast(self, text: str) -> str:
        """Rank 0's text, once all have it."""
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0)
        data = data if self.leads else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        dist.barrier()  # rank 0 may be about to end
        return data.numpy().tobytes().decode()

    def gather(self, *numbers: int) -> list[tuple[int, ...]]:
        """These numbers of every rank, by rank."""
        if self.size == 1:
            return [numbers]
        mine = torch.tensor(numbers)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        return [tuple(each.tolist()) for each in everyone]

    def sum(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each of these numbers summed over all ranks, where the numbers are; nobody waits for a GPU."""
        if self.size == 1:
            return numbers
        sums = torch.stack([each.double() for each in numbers.values()])
        dist.all_reduce(sums, group=self.group)
        return dict(zip(numbers, sums.unbind(), strict=True))

    def parallel(self, objective: nn.Module) -> nn.Module:
        """The same with rank 0's weights, whose gradients are summed over all ranks while backward goes on."""
        if self.size == 1:
            return objective
        wrapped = DistributedDataParallel(objective, process_group=self.group, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(self.group, summed)
        return wrapped


def summed(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A bucket of gradients over all ranks; torch's own hook takes the mean, which is of no use with ragged labels."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def accumulating(objective: nn.Module) -> AbstractContextManager:
    """Gradients stay on their rank: more will be added to them."""
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else nullcontext()


ALONE = Ranks(World())


@contextmanager
def joined(world: World) -> Iterator[Ranks]:
    """Meet the other ranks of the world, and part at the end.

    Raises MissingResource where they do not come, LostRank when one is gone or hangs.
    """
    if world.size == 1:
        yield ALONE
        return
    meet(world)
    ranks, broken = Ranks(world), False
    try:
        yield ranks
    except RuntimeError as error:
        broken = is_of_a_connection(error)
        if broken:
            raise lost(ranks, error) from error
        raise
    finally:
        if not (broken and ranks.on_gpu):  # NCCL would wait for the lost one
            dist.destroy_process_group()


def meet(world: World) -> None:
    """Connect all ranks. Raises MissingResource where that cannot be."""
    try:
        store, _, _ = next(
            dist.rendezvous(f"tcp://{world.meeting}", world.rank, world.size, timeout=timedelta(seconds=JOIN_SECONDS))
        )
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingResource(
            f"rank {world.rank} could not meet the other {world.size - 1} at {world.meeting}: {reason}"
        ) from error


def is_of_a_connection(error: RuntimeError) -> bool:
    """Whether torch says so of the wire to another rank; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def lost(ranks: Ranks, error: RuntimeError) -> LostRank:
    """The sentence for a connection that broke or fell silent."""
    if "timed out" in str(error).lower():
        what = (
            f"rank {ranks.rank} heard nothing of another for {ranks.seconds} s (train.rank_timeout_seconds): it hangs"
        )
    else:
        what = f"rank {ranks.rank} lost the connection to another: that one has ended, and said why if it could"
    return LostRank(f"{what}. The same command goes on from the newest checkpoint")
