"""One thread owns the engine. The event loop hands it requests through a queue and never waits for a step."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, Self

from benthic.base.errors import InputError
from benthic.inference.request import Delta, Request
from benthic.server.errors import ApiError

log = logging.getLogger("benthic.server")


class Step(Protocol):
    """What the worker reads of a step."""

    @property
    def deltas(self) -> Sequence[Delta]: ...


class Engine(Protocol):
    """What the worker needs of an engine (`benthic.inference.engine.Engine`)."""

    def add(self, request: Request) -> int:
        """Queue a request; InputError where it cannot run."""
        ...

    def abort(self, request_id: int) -> None:
        """Forget an unfinished request and free what it holds."""
        ...

    def step(self) -> Step:
        """Advance the requests of one batch; `deltas` says by what."""
        ...

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to report."""
        ...

    def close(self) -> None:
        """End what runs beside this process."""
        ...


class Stream:
    """A place in the worker and the tokens that arrive there. Belongs to the event loop.

    `async with worker.open() as stream` gives the place back and stops the engine's work, however the block ends;
    inside, `stream.start(request)` once and `async for ids, finish_reason in stream`.
    """

    def __init__(self, worker: "Worker"):
        self._worker = worker
        self._ids: list[int] = []
        self._finish_reason = ""
        self._error: ApiError | None = None
        self._changed = asyncio.Event()
        self._ended = False  # the reader has seen the finish reason
        self.started = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._worker.close(self)

    def start(self, request: Request) -> None:
        """Hand the request to the engine thread."""
        self.started = True
        self._worker.submit(self, request)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[list[int], str]:
        """All ids since the last call and the finish reason, "" while it goes on. Raises ApiError if it failed."""
        if self._ended:
            raise StopAsyncIteration
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error
        ids, self._ids = self._ids, []
        self._ended = bool(self._finish_reason)
        return ids, self._finish_reason

    @property
    def finished(self) -> bool:
        """The engine has forgotten the request by itself."""
        return bool(self._finish_reason) or self._error is not None

    def feed(self, ids: list[int], finish_reason: str) -> None:
        """Add what one step brought."""
        self._ids += ids
        self._finish_reason = finish_reason
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """End the request with an error, unless it has finished."""
        if not self.finished:
            self._error = error
            self._changed.set()


class Worker:
    """At most `capacity` requests at once, running and waiting together."""

    def __init__(self, engine: Engine, capacity: int):
        self._engine = engine
        self._capacity = capacity
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="benthic-engine", daemon=True)
        self._open: set[Stream] = set()  # event loop only
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[int, Stream] = {}  # engine thread only, like the next two
        self._ids: dict[Stream, int] = {}
        self._stopped = False
        self.refusal = ""  # why no request is accepted; "" while they are

    def run(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    # On the event loop

    def open(self) -> Stream:
        """Take a place. Raises ApiError 503 while none is given, 429 where all are taken."""
        if self.refusal:
            raise ApiError(503, self.refusal, code="unavailable", headers=(("retry-after", "1"),))
        if len(self._open) >= self._capacity:
            message = f"all {self._capacity} places are taken -> try again later"
            raise ApiError(429, message, code="queue_full", headers=(("retry-after", "1"),))
        self._loop = asyncio.get_running_loop()
        stream = Stream(self)
        self._open.add(stream)
        return stream

    def submit(self, stream: Stream, request: Request) -> None:
        """Have the engine thread add the request before its next step."""
        self._inbox.put(partial(self._add, stream, request))

    def close(self, stream: Stream) -> None:
        """Give the place back; an unfinished request is aborted before the engine's next step."""
        self._open.discard(stream)
        if stream.started and not stream.finished:
            self._inbox.put(partial(self._abort, stream))

    @property
    def idle(self) -> bool:
        """No request is running or waiting."""
        return not self._open

    def drain(self) -> None:
        """Accept no more requests; those accepted go on."""
        self.refusal = self.refusal or "the server is shutting down"

    def stop(self) -> None:
        """End the thread after the current step; requests that are left fail with 503."""
        self.drain()
        self._inbox.put(self._halt)

    def join(self, timeout: float) -> None:
        """Wait for the thread to end."""
        self._thread.join(timeout)

    def _fail_open(self, message: str) -> None:
        for stream in self._open:
            stream.fail(ApiError(503, message, code="unavailable"))

    # In the engine thread

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._take()
                if not self._stopped:
                    self._step()
        except Exception:
            log.exception("the engine is beyond repair; requests are refused until the server is restarted")
        finally:  # nobody waits for a dead engine
            self.refusal = self.refusal or "the engine has failed -> restart the server"
            self._call(partial(self._fail_open, self.refusal))
            self._engine.close()

    def _take(self) -> None:
        """Do what the event loop asked for; with nothing to run, sleep until it asks."""
        while not self._stopped and (not self._engine.busy or not self._inbox.empty()):
            self._inbox.get()()

    def _step(self) -> None:
        try:
            deltas = [delta for delta in self._engine.step().deltas if delta.request_id in self._running]
        except Exception as error:
            if not self._running:
                raise  # nobody to tell: the engine itself is broken
            log.exception("the engine failed; %d running requests end with an error", len(self._running))
            self._fail_running(error)
            return
        self._call(partial(_feed, [(self._running[d.request_id], d.token_ids, d.finish_reason) for d in deltas]))
        for delta in deltas:
            if delta.finish_reason:
                del self._ids[self._running.pop(delta.request_id)]

    def _fail_running(self, error: Exception) -> None:
        """Fail what runs and clear the engine. Where that fails too, the thread ends and the server refuses all."""
        streams = dict(self._running)
        self._running.clear()
        self._ids.clear()
        try:
            for request_id in streams:
                self._engine.abort(request_id)
        finally:
            self._call(lambda: [stream.fail(_failure(error)) for stream in streams.values()])

    def _add(self, stream: Stream, request: Request) -> None:
        try:
            request_id = self._engine.add(request)
        except InputError as error:
            self._call(partial(stream.fail, ApiError(400, str(error))))
            return
        except Exception as error:
            log.exception("the engine could not take a request, which ends with an error")
            self._call(partial(stream.fail, _failure(error)))
            return
        self._running[request_id], self._ids[stream] = stream, request_id

    def _abort(self, stream: Stream) -> None:
        request_id = self._ids.pop(stream, None)
        if request_id is not None:  # None: it finished meanwhile
            del self._running[request_id]
            self._engine.abort(request_id)

    def _halt(self) -> None:
        self._stopped = True
        for request_id in self._running:
            self._engine.abort(request_id)

    def _call(self, action: Callable[[], object]) -> None:
        """Have the event loop do `action`."""
        if self._loop is None:
            return  # no request ever came
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: the server is gone, and with it every reader
                raise


def _feed(news: list[tuple[Stream, list[int], str]]) -> None:
    for stream, ids, finish_reason in news:
        stream.feed(ids, finish_reason)


def _failure(error: Exception) -> ApiError:
    return ApiError(500, f"the engine failed ({type(error).__name__})", code="engine_failed")
