"""Tasks to be done here: one after the other in this process, or by several at a time, each in one of its own.

Tasks are begun in their order, and where there is a limit of tokens no more of them than it takes.
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

from smolforge.data.prepare import jobs
from smolforge.data.prepare.jobs import Task
from smolforge.errors import MissingResource

Enough = Callable[[Sequence[Task]], bool]
SECONDS = 0.5
_told: Any = None
"""In a worker: where it tells what it did."""


def do_all(todo: Sequence[Task], enough: Enough, tell: jobs.Tell, workers: int) -> list[Task]:
    """Do tasks in their order until all, or `enough`, are done; returns those, the first ones.

    Raises what a task raises, and then nothing more is begun.
    """
    several = workers > 1 and sum(not jobs.is_done(task) for task in todo) > 1
    done: list[Task] = []
    for task in in_processes(todo, tell, workers) if several else here(todo, tell):
        done.append(task)
        if enough(done):
            break
    return done


def here(todo: Sequence[Task], tell: jobs.Tell) -> Iterator[Task]:
    for task in todo:
        jobs.run(task, tell)
        yield task


def in_processes(todo: Sequence[Task], tell: jobs.Tell, workers: int) -> Iterator[Task]:
    """The same, each in the order of the tasks, however they end."""
    context = multiprocessing.get_context("spawn")  # the tokenizers' threads do not survive a fork
    told: Any = context.Queue()
    waiting: deque[tuple[Task, Future[None]]] = deque()
    rest = iter(todo)
    with pool_of(workers, context, told) as pool:
        while True:
            while len(waiting) < 2 * workers and (task := next(rest, None)) is not None:
                with uninterrupted():
                    waiting.append((task, pool.submit(tasks_run, replace(task, alone=False))))
            if not waiting:
                return
            while not waiting[0][1].done():
                wait([future for _, future in waiting], SECONDS, FIRST_COMPLETED)
                pass_on(told, tell)
                for _, future in waiting:
                    if future.done():
                        future.result()  # an error ends it now, whosever turn it is
            task, future = waiting.popleft()
            future.result()
            pass_on(told, tell)
            yield task


@contextmanager
def pool_of(workers: int, context: Any, told: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, and at once where it fails."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, begin, (told,))
    finished = False
    try:
        yield pool
        finished = True
    except BrokenProcessPool:
        raise MissingResource(
            "a process that prepared the text was ended from outside, perhaps because the memory was full; "
            "the same command goes on from there, with fewer --workers if need be"
        ) from None
    finally:
        if not finished:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(cancel_futures=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes that are begun here never hear of Ctrl-C, and this one, which acts on it, hears of it afterwards."""
    heard: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, lambda *_: heard.append(1)) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if heard:
            signal.raise_signal(signal.SIGINT)


def begin(told: Any) -> None:
    """In a new worker: end with the parent."""
    global _told
    _told = told
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)


def tasks_run(task: Task) -> None:
    jobs.run(task, _told.put)


def pass_on(told: Any, tell: jobs.Tell) -> None:
    """What the workers told since the last time."""
    total: Counter[str] = Counter()
    while True:
        try:
            total.update(told.get_nowait())
        except Empty:
            break
    if total:
        tell(dict(total))
