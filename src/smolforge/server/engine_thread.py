"""The engine in a thread of its own, and the tickets by which requests hear from it.

    event loop:  take(jobs) -> Ticket, read piece by piece          ticket.close(): its slots are free
    thread:      what was asked since, then a step, then its pieces to their tickets, again and again

One lock guards what was asked for; the engine itself belongs to the thread alone.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from smolforge.generation.engine import Request
from smolforge.generation.stream import Piece, Writer
from smolforge.server.middleware import Metrics
from smolforge.server.responses import Broken, Refused, closing

log = logging.getLogger("smolforge.server")


class Job(NamedTuple):
    """One choice of an answer."""

    request: Request
    stop: tuple[str, ...]


class Ticket:
    """What one HTTP request asked for: several jobs, whose pieces come as they are made."""

    def __init__(self, desk: "Desk", jobs: Sequence[Job]) -> None:
        self.desk, self.jobs = desk, jobs
        self.loop, self.heard = asyncio.get_running_loop(), asyncio.Queue()
        self.open, self.left, self.begun = True, len(jobs), time.perf_counter()
        self.last: list[float | None] = [None] * len(jobs)
        """When each job's last token came."""
        self.watch: asyncio.Future[None] | None = None
        """What waits for the client to hang up; it ends with the ticket."""

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the job, piece), until each job has ended. Raises Refused where the server ends first."""
        while self.left:
            said = await self.heard.get()
            if isinstance(said, Refused):
                raise said
            self.left -= said[1].finish_reason is not None
            yield said

    def tell(self, said: tuple[int, Piece] | Refused) -> None:
        """From the thread."""
        try:
            self.loop.call_soon_threadsafe(self.heard.put_nowait, said)
        except RuntimeError:  # the loop is closed, and so is whoever listened
            self.open = False

    def close(self) -> None:
        """Nobody listens any more. From the event loop, at any time, more than once."""
        if self.watch is not None:
            self.watch.cancel()
        self.desk.close(self)


class Desk:
    """Takes requests in order; `queue` of them may wait beyond what the engine has slots for."""

    def __init__(self, writer: Writer, metrics: Metrics, queue: int) -> None:
        self.writer, self.metrics, self.most = writer, metrics, writer.engine.slots + queue
        self.condition = threading.Condition()
        self.tickets: set[Ticket] = set()
        self.taken: list[Ticket] = []
        self.given_up: list[Ticket] = []
        self.jobs: dict[int, tuple[Ticket, int]] = {}
        self.draining = self.stopped = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def take(self, jobs: Sequence[Job]) -> Ticket:
        """Put jobs in line. Raises Refused where the server closes or too many wait."""
        with self.condition:
            if self.draining:
                raise closing()
            if len(self.tickets) >= self.most:
                said = f"{len(self.tickets)} requests are being answered or wait; ask again soon"
                raise Refused(429, said, code="queue_full", retry_after=1)
            ticket = Ticket(self, jobs)
            self.tickets.add(ticket)
            self.taken.append(ticket)
            self.condition.notify_all()
        return ticket

    def close(self, ticket: Ticket) -> None:
        with self.condition:
            if ticket in self.tickets:
                self.tickets.discard(ticket)
                ticket.open = False
                self.given_up.append(ticket)
                self.condition.notify_all()

    def drain(self, seconds: float) -> None:
        """Take nothing more, wait for what there is, then end the rest with an error, and the thread."""
        with self.condition:
            self.draining = True
            self.condition.wait_for(lambda: not self.tickets, seconds)
            for ticket in self.tickets:
                ticket.tell(closing())
            self.stopped = True
            self.condition.notify_all()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        engine = self.writer.engine
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.stopped or self.taken or self.given_up or engine.busy)
                if self.stopped:
                    return
                taken, self.taken = self.taken, []
                given_up, self.given_up = self.given_up, []
            try:
                self._arrange(taken, given_up)
                for number, piece in self.writer.step() if engine.busy else ():
                    self._deliver(number, piece)
            except Exception:
                log.exception("the engine failed; its requests were given up")
                self._give_up(taken)
            self._measure()

    def _arrange(self, taken: Sequence[Ticket], given_up: Sequence[Ticket]) -> None:
        for ticket in taken:
            for place, job in enumerate(ticket.jobs):
                self.jobs[self.writer.submit(job.request, job.stop)] = ticket, place
        gone = set(given_up)
        for number in [number for number, (ticket, _) in self.jobs.items() if ticket in gone]:
            self.writer.cancel(number)
            del self.jobs[number]
            self.metrics.finished["abort"].inc()

    def _deliver(self, number: int, piece: Piece) -> None:
        ticket, place = self.jobs[number]
        new = len(piece.token_ids)
        self.metrics.generated.inc(new)
        now, last = time.perf_counter(), ticket.last[place]
        if new and last is None:
            self.metrics.first_token.observe(now - ticket.begun)
        elif new and last is not None:
            self.metrics.between_tokens.observe((now - last) / new)
        ticket.last[place] = now if new else last
        if piece.finish_reason is not None:
            del self.jobs[number]
            self.metrics.prompt.inc(len(ticket.jobs[place].request.prompt))
            self.metrics.finished[piece.finish_reason].inc()
            self.metrics.whole.observe(now - ticket.begun)
        ticket.tell((place, piece))

    def _give_up(self, taken: Sequence[Ticket]) -> None:
        """After an error: everyone under way is told."""
        self.writer.clear()
        told = {*taken, *(ticket for ticket, _ in self.jobs.values())}
        self.jobs.clear()
        for ticket in told:
            ticket.tell(Broken())

    def _measure(self) -> None:
        engine = self.writer.engine
        self.metrics.running.set(engine.used_slots)
        self.metrics.waiting.set(len(engine.waiting))
        self.metrics.cache.set(engine.used_tokens / (engine.slots * engine.capacity))
