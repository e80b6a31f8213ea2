"""Tasks as jobs of a cluster, by datatrove's executors: a job for each part, and one that puts them together.

    prepare here: the tokenizer, the plan, the tasks  ->  Slurm or Ray: our step, once for each task  ->  the corpus

All machines see the same folder. What a job did is skipped by the next, here as there, so that jobs that died are
begun again by the same command, and the last of it may be done on the machine that asked.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smolforge.config import Data
from smolforge.data.prepare import build, jobs, plan
from smolforge.errors import MissingResource
from smolforge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Cluster:
    """Where jobs go."""

    kind: Literal["slurm", "ray"]
    workers: int = -1
    """Jobs at a time; -1 is as many as there is room for."""
    partition: str | None = None
    hours: int = 24
    logs: Path | None = None


class DoTask:
    """A step of a datatrove pipeline: rank n does task n."""

    name = "smolforge prepare"
    type = "tokens"

    def __init__(self, todo: list[jobs.Task]) -> None:
        self.todo = todo

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        for task in self.todo[rank::world_size]:
            jobs.run(task)
        return iter(())


class PutTogether:
    """The step after all tasks: what prepare does with what is done."""

    name = "smolforge prepare: the corpus"
    type = "tokens"

    def __init__(self, data: Data, folder: Path, tokenizer: Tokenizer | None, vocab_size: int, limit: int | None):
        self.asked = (data, folder, vocab_size, limit)
        self.tokenizer_folder = build.work_folder(folder) / "tokenizer" if tokenizer is not None else None

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        asked, folder, vocab_size, limit = self.asked
        tokenizer = Tokenizer.load(self.tokenizer_folder) if self.tokenizer_folder else None
        build.prepare(asked, folder, tokenizer, vocab_size, limit)
        return iter(())


def submit(
    data: Data, folder: Path, tokenizer: Tokenizer | None, vocab_size: int, limit: int | None, cluster: Cluster
) -> int:
    """Hand the tasks to a cluster, and behind them what makes the corpus; returns how many there are.

    Raises MissingResource where datatrove, or the cluster's own command, is not there.
    """
    tokenizer = build.for_format(data, tokenizer)
    request = build.request_of(data, tokenizer, vocab_size, limit)
    if build.already(folder, request) is not None:
        return 0
    check_there(cluster)
    with build.begun(folder) as work:
        todo, _ = plan.planned_tasks(work, request, data, tokenizer, vocab_size, limit)
        together = PutTogether(data, folder.absolute(), tokenizer, vocab_size, limit)
        first, last = executors(todo, together, work.absolute() / "jobs", cluster)
    try:
        if cluster.kind == "ray":
            first.run()
        last.run()
    except subprocess.CalledProcessError as error:
        raise MissingResource(f"{error.cmd[0]} refused the jobs with status {error.returncode}; it says why") from None
    return len(todo)


def check_there(cluster: Cluster) -> None:
    """Raises MissingResource where something is not here that jobs are handed over with."""
    for package, named in (("datatrove", "'smolforge[data]'"), ("ray", "ray")):
        if package in ("datatrove", cluster.kind) and importlib.util.find_spec(package) is None:
            raise MissingResource(f"--executor {cluster.kind} needs {package}; pip install {named} brings it")
    if cluster.kind == "slurm" and shutil.which("sbatch") is None:
        raise MissingResource("sbatch is not here: prepare --executor slurm runs where jobs are submitted")


def executors(todo: list[jobs.Task], together: PutTogether, logs: Path, cluster: Cluster) -> tuple[Any, Any]:
    """datatrove's executor of all tasks, and that of the step behind them."""
    from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

    if cluster.kind == "ray":
        each: dict[str, Any] = {"workers": cluster.workers}
        return (
            RayPipelineExecutor([DoTask(todo)], tasks=len(todo), logging_dir=str(logs / "tasks"), **each),
            RayPipelineExecutor([together], tasks=1, logging_dir=str(logs / "corpus")),
        )
    given: dict[str, Any] = {"time": f"{cluster.hours}:00:00", "partition": cluster.partition or "cpu", "qos": ""}
    first = SlurmPipelineExecutor(
        [DoTask(todo)],
        tasks=len(todo),
        workers=cluster.workers,
        job_name="smolforge-prepare",
        logging_dir=str(logs / "tasks"),
        **given,
    )
    last = SlurmPipelineExecutor(
        [together], tasks=1, job_name="smolforge-corpus", logging_dir=str(logs / "corpus"), depends=first, **given
    )
    return first, last
