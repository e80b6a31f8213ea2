"""Run jobs on this machine: one after the other in this process, or several at a time, each in a process of its own.

Jobs are started in order, and no more of them than a limit of tokens needs.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import connection
from queue import Empty
from typing import Any

from smolforge import operating_system
from smolforge.data.prepare import jobs
from smolforge.data.prepare.jobs import PrepareJob
from smolforge.errors import MissingResourceError

StopCondition = Callable[[Sequence[PrepareJob]], bool]
POLL_SECONDS = 0.5
_progress_queue: Any = None
"""In a worker process: where it reports its progress."""


def run_jobs(
    todo: Sequence[PrepareJob], enough: StopCondition, report: jobs.ProgressCallback, *, workers: int
) -> list[PrepareJob]:
    """Run jobs in order until all, or `enough`, are done; return the finished ones.

    Raises what a job raises; then no other is started.
    """
    several = workers > 1 and sum(not jobs.is_done(job) for job in todo) > 1
    finished: list[PrepareJob] = []
    for job in run_in_processes(todo, report, workers) if several else run_sequentially(todo, report):
        finished.append(job)
        if enough(finished):
            break
    return finished


def run_sequentially(todo: Sequence[PrepareJob], report: jobs.ProgressCallback) -> Iterator[PrepareJob]:
    for job in todo:
        jobs.run_job(job, report)
        yield job


def run_in_processes(todo: Sequence[PrepareJob], report: jobs.ProgressCallback, workers: int) -> Iterator[PrepareJob]:
    """Run jobs in worker processes; yield them in their order, whichever ends first."""
    context = multiprocessing.get_context("spawn")  # the tokenizers' threads do not survive a fork
    progress_queue: Any = context.Queue()
    pending: deque[tuple[PrepareJob, Future[None]]] = deque()
    remaining = iter(todo)
    with worker_pool(workers, context, progress_queue) as pool:
        while True:
            while len(pending) < 2 * workers and (job := next(remaining, None)) is not None:
                with operating_system.sigint_blocked():
                    pending.append((job, pool.submit(run_in_worker, replace(job, exclusive=False))))
            if not pending:
                return
            while not pending[0][1].done():
                wait([future for _, future in pending], POLL_SECONDS, FIRST_COMPLETED)
                forward_progress(progress_queue, report)
                for _, future in pending:
                    if future.done():
                        future.result()  # an error ends it now, whosever turn it is
            job, future = pending.popleft()
            future.result()
            forward_progress(progress_queue, report)
            yield job


@contextmanager
def worker_pool(workers: int, context: Any, progress_queue: Any) -> Iterator[ProcessPoolExecutor]:
    """Start processes that end with this one, and at once where it fails."""
    existing = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, init_worker, (progress_queue,))
    finished = False
    try:
        yield pool
        finished = True
    except BrokenProcessPool:
        raise MissingResourceError(
            "a process that prepared the text was ended from outside, perhaps because the memory was full; "
            "the same command goes on from there, with fewer --workers if need be"
        ) from None
    finally:
        if not finished:
            for process in set(multiprocessing.active_children()) - existing:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def init_worker(progress_queue: Any) -> None:
    """Set up a new worker process, so that it ends with its parent."""
    global _progress_queue
    _progress_queue = progress_queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)


def run_in_worker(job: PrepareJob) -> None:
    jobs.run_job(job, _progress_queue.put)


def forward_progress(progress_queue: Any, report: jobs.ProgressCallback) -> None:
    """Report what the workers put into the queue since the last call."""
    total: Counter[str] = Counter()
    while True:
        try:
            total.update(progress_queue.get_nowait())
        except Empty:
            break
    if total:
        report(dict(total))
