"""Run the jobs on a cluster, by datatrove's executors: one job for each part, and one that writes the corpus.

    prepare here: the tokenizer, the plan, the jobs  ->  Slurm or Ray: our step, once for each job  ->  the corpus

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
from smolforge.errors import MissingResourceError
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


class RunPrepareJob:
    """A step of a datatrove pipeline: rank n runs job n."""

    name = "smolforge prepare"
    type = "tokens"

    def __init__(self, todo: list[jobs.PrepareJob]) -> None:
        self.todo = todo

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        for job in self.todo[rank::world_size]:
            jobs.run_job(job)
        return iter(())


class AssembleCorpus:
    """The step after all jobs: write the corpus from their chunks."""

    name = "smolforge prepare: the corpus"
    type = "tokens"

    def __init__(self, data: Data, folder: Path, tokenizer: Tokenizer | None, *, vocab_size: int, limit: int | None):
        self.arguments = (data, folder, vocab_size, limit)
        self.tokenizer_folder = build.work_folder(folder) / "tokenizer" if tokenizer is not None else None

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        data_settings, folder, vocab_size, limit = self.arguments
        tokenizer = Tokenizer.load(self.tokenizer_folder) if self.tokenizer_folder else None
        build.prepare(data_settings, folder, tokenizer, vocab_size=vocab_size, max_tokens=limit)
        return iter(())


def submit_jobs(
    data: Data, folder: Path, tokenizer: Tokenizer | None, *, vocab_size: int, limit: int | None, cluster: Cluster
) -> int:
    """Submit the jobs to a cluster, and after them the step that writes the corpus; return how many there are.

    Raises MissingResourceError where datatrove, or the cluster's own command, is not there.
    """
    tokenizer = build.tokenizer_for_format(data, tokenizer)
    request = build.request_of(data, tokenizer, vocab_size, max_tokens=limit)
    if build.existing_corpus(folder, request) is not None:
        return 0
    check_available(cluster)
    with build.open_work_folder(folder) as work:
        todo, _ = plan.plan_jobs(work, request, data, tokenizer=tokenizer, vocab_size=vocab_size, max_tokens=limit)
        assembly = AssembleCorpus(data, folder.absolute(), tokenizer, vocab_size=vocab_size, limit=limit)
        first, last = executors(todo, assembly, work.absolute() / "jobs", cluster=cluster)
    try:
        if cluster.kind == "ray":
            first.run()
        last.run()
    except subprocess.CalledProcessError as error:
        raise MissingResourceError(
            f"{error.cmd[0]} refused the jobs with status {error.returncode}; it says why"
        ) from None
    return len(todo)


def check_available(cluster: Cluster) -> None:
    """Raise MissingResourceError where a package or command that submits jobs is missing."""
    for package, requirement in (("datatrove", "'smolforge[data]'"), ("ray", "ray")):
        if package in ("datatrove", cluster.kind) and importlib.util.find_spec(package) is None:
            raise MissingResourceError(
                f"--executor {cluster.kind} needs {package}; pip install {requirement} brings it"
            )
    if cluster.kind == "slurm" and shutil.which("sbatch") is None:
        raise MissingResourceError("sbatch is not here: prepare --executor slurm runs where jobs are submitted")


def executors(
    todo: list[jobs.PrepareJob], assembly: AssembleCorpus, logs: Path, *, cluster: Cluster
) -> tuple[Any, Any]:
    """Return datatrove's executor of all jobs, and that of the step after them."""
    from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

    def executor(step: Any, tasks: int, job: str, *, logs: Path, **options: Any) -> Any:
        options |= {"tasks": tasks, "logging_dir": str(logs)}
        if cluster.kind == "ray":
            return RayPipelineExecutor([step], **options)
        options |= {"time": f"{cluster.hours}:00:00", "partition": cluster.partition or "cpu", "qos": ""}
        return SlurmPipelineExecutor([step], job_name=f"smolforge-{job}", **options)

    first = executor(RunPrepareJob(todo), len(todo), "prepare", logs=logs / "tasks", workers=cluster.workers)
    after = {} if cluster.kind == "ray" else {"depends": first}
    return first, executor(assembly, 1, "corpus", logs=logs / "corpus", **after)
