"""Run the engine in its own thread, and stream its chunks to the requests.

    event loop:  submit(choices) -> ResponseStream, read chunk by chunk     stream.close(): its slots are free
    thread:      new and cancelled requests, then one engine step, then its chunks to their streams, in a loop

One lock guards the request lists; only the thread touches the engine.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from smolforge.generation.engine import Request
from smolforge.generation.stream import TextChunk, TextEngine
from smolforge.server.middleware import Metrics
from smolforge.server.responses import APIError, InternalServerError, shutting_down

log = logging.getLogger("smolforge.server")


class Choice(NamedTuple):
    """One choice of a response."""

    request: Request
    stop: tuple[str, ...]


class ResponseStream:
    """The choices of one HTTP request, whose chunks arrive as they are generated."""

    def __init__(self, engine_thread: "EngineThread", choices: Sequence[Choice]) -> None:
        self.engine_thread, self.choices = engine_thread, choices
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()
        self.is_open, self.num_unfinished, self.start_time = True, len(choices), time.perf_counter()
        self.last_token_times: list[float | None] = [None] * len(choices)
        """When each choice's last token came."""
        self.disconnect_task: asyncio.Future[None] | None = None
        """Waits for the client to disconnect; it ends with the stream."""

    async def chunks(self) -> AsyncIterator[tuple[int, TextChunk]]:
        """Yield (index of choice, chunk) until each choice has finished. Raises APIError if the server ends first."""
        while self.num_unfinished:
            item = await self.queue.get()
            if isinstance(item, APIError):
                raise item
            self.num_unfinished -= item[1].finish_reason is not None
            yield item

    def put(self, item: tuple[int, TextChunk] | APIError) -> None:
        """Put an item into the queue. Called from the engine thread."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the loop is closed, and so is whoever listened
            self.is_open = False

    def close(self) -> None:
        """Cancel the request. Called from the event loop, at any time, more than once."""
        if self.disconnect_task is not None:
            self.disconnect_task.cancel()
        self.engine_thread.close(self)


class EngineThread:
    """Run requests in order; `queue` of them may wait beyond the engine's slots."""

    def __init__(self, text_engine: TextEngine, metrics: Metrics, queue: int) -> None:
        self.text_engine, self.metrics, self.max_streams = text_engine, metrics, text_engine.engine.slots + queue
        self.condition = threading.Condition()
        self.streams: set[ResponseStream] = set()
        self.submitted: list[ResponseStream] = []
        self.cancelled: list[ResponseStream] = []
        self.active_choices: dict[int, tuple[ResponseStream, int]] = {}
        self.draining = self.stopped = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def submit(self, choices: Sequence[Choice]) -> ResponseStream:
        """Queue choices. Raises APIError where the server is closing or too many requests wait."""
        with self.condition:
            if self.draining:
                raise shutting_down()
            if len(self.streams) >= self.max_streams:
                message = f"{len(self.streams)} requests are being answered or wait; ask again soon"
                raise APIError(429, message, code="queue_full", retry_after=1)
            stream = ResponseStream(self, choices)
            self.streams.add(stream)
            self.submitted.append(stream)
            self.condition.notify_all()
        return stream

    def close(self, stream: ResponseStream) -> None:
        with self.condition:
            if stream in self.streams:
                self.streams.discard(stream)
                stream.is_open = False
                self.cancelled.append(stream)
                self.condition.notify_all()

    def drain(self, seconds: float) -> None:
        """Accept nothing more, wait for running requests, then end the rest with an error, and the thread."""
        with self.condition:
            self.draining = True
            self.condition.wait_for(lambda: not self.streams, seconds)
            for stream in self.streams:
                stream.put(shutting_down())
            self.stopped = True
            self.condition.notify_all()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        engine = self.text_engine.engine
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.stopped or self.submitted or self.cancelled or engine.busy)
                if self.stopped:
                    return
                submitted, self.submitted = self.submitted, []
                cancelled, self.cancelled = self.cancelled, []
            try:
                self._apply_changes(submitted, cancelled)
                for request_id, chunk in self.text_engine.step() if engine.busy else ():
                    self._deliver(request_id, chunk)
            except Exception:
                log.exception("the engine failed; its requests were given up")
                self._fail_all(submitted)
            self._update_gauges()

    def _apply_changes(self, submitted: Sequence[ResponseStream], cancelled: Sequence[ResponseStream]) -> None:
        for stream in submitted:
            for index, choice in enumerate(stream.choices):
                self.active_choices[self.text_engine.submit(choice.request, choice.stop)] = stream, index
        closed = set(cancelled)
        for request_id in [request_id for request_id, (stream, _) in self.active_choices.items() if stream in closed]:
            self.text_engine.cancel(request_id)
            del self.active_choices[request_id]
            self.metrics.request_success["abort"].inc()

    def _deliver(self, request_id: int, chunk: TextChunk) -> None:
        stream, index = self.active_choices[request_id]
        num_new = len(chunk.token_ids)
        self.metrics.generation_tokens.inc(num_new)
        now, last = time.perf_counter(), stream.last_token_times[index]
        if num_new and last is None:
            self.metrics.time_to_first_token.observe(now - stream.start_time)
        elif num_new and last is not None:
            self.metrics.inter_token_latency.observe((now - last) / num_new)
        stream.last_token_times[index] = now if num_new else last
        if chunk.finish_reason is not None:
            del self.active_choices[request_id]
            self.metrics.prompt_tokens.inc(len(stream.choices[index].request.prompt))
            self.metrics.request_success[chunk.finish_reason].inc()
            self.metrics.e2e_latency.observe(now - stream.start_time)
        stream.put((index, chunk))

    def _fail_all(self, submitted: Sequence[ResponseStream]) -> None:
        """Send an error to all requests after the engine failed."""
        self.text_engine.clear()
        streams = {*submitted, *(stream for stream, _ in self.active_choices.values())}
        self.active_choices.clear()
        for stream in streams:
            stream.put(InternalServerError())

    def _update_gauges(self) -> None:
        engine = self.text_engine.engine
        self.metrics.running.set(engine.used_slots)
        self.metrics.waiting.set(len(engine.waiting))
        self.metrics.kv_cache_usage.set(engine.used_tokens / (engine.slots * engine.capacity))
