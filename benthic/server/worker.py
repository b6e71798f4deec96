"""One thread owns the engine. The event loop hands it requests through a queue and never waits for a step."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from benthic.base.errors import InputError
from benthic.inference.request import Delta, Request
from benthic.server.errors import ApiError
from benthic.server.stream import Stream, Ticket

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


class Worker:
    """At most `capacity` requests at once, running and waiting together, each for `request_timeout` seconds at most."""

    def __init__(self, engine: Engine, capacity: int, request_timeout: float = 3600.0):
        self._engine = engine
        self._capacity = capacity
        self._request_timeout = request_timeout
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="benthic-engine", daemon=True)
        self._open: dict[Stream, int] = {}  # places that each has taken; event loop only
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[int, Ticket] = {}  # engine thread only
        self._stopped = False  # the same
        self.refusal = ""  # why no request is accepted; "" while they are

    def run(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    # On the event loop

    def open(self, client: str) -> Stream:
        """Take a place for `client`. Raises ApiError 503 while none is given, 429 where all are taken."""
        if self.refusal:
            raise ApiError(503, self.refusal, code="unavailable", headers=(("retry-after", "1"),))
        self._check_room(1)
        self._loop = asyncio.get_running_loop()
        stream = Stream(self, client, self._request_timeout)
        self._open[stream] = 1
        return stream

    def submit(self, stream: Stream, tickets: list[Ticket]) -> None:
        """Have the engine thread add the requests before its next step."""
        self._check_room(len(tickets) - 1)
        self._open[stream] = len(tickets)
        self._inbox.put(partial(self._add, tickets))

    def withdraw(self, tickets: list[Ticket]) -> None:
        """Have the engine thread abort the requests before its next step."""
        self._inbox.put(partial(self._abort, tickets))

    def close(self, stream: Stream) -> None:
        """Give the place back."""
        self._open.pop(stream, None)

    def _check_room(self, more: int) -> None:
        if sum(self._open.values()) + more > self._capacity:
            message = f"all {self._capacity} places are taken -> try again later"
            raise ApiError(429, message, code="queue_full", headers=(("retry-after", "1"),))

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
        for stream in list(self._open):
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
            deltas = self._engine.step().deltas
        except Exception as error:
            if not self._running:
                raise  # nobody to tell: the engine itself is broken
            log.exception("the engine failed; %d running requests end with an error", len(self._running))
            self._fail_running(error)
            return
        news = [(self._running[delta.request_id], delta) for delta in deltas if delta.request_id in self._running]
        if news:
            self._call(partial(_feed, news))
        for _, delta in news:
            if delta.finish_reason:
                del self._running[delta.request_id]

    def _fail_running(self, error: Exception) -> None:
        """Fail what runs and clear the engine. Where that fails too, the thread ends and the server refuses all."""
        tickets, self._running = self._running, {}
        try:
            for request_id in tickets:
                self._engine.abort(request_id)
        finally:
            self._call(partial(_fail, list(tickets.values()), _failure(error)))

    def _add(self, tickets: list[Ticket]) -> None:
        """Add the requests to the engine. One that it does not take ends them all."""
        for ticket in tickets:
            try:
                ticket.request_id = self._engine.add(ticket.request)
            except InputError as error:
                self._call(partial(_fail, [ticket], ApiError(400, str(error))))
                return
            except Exception as error:
                log.exception("the engine could not take a request, which ends with an error")
                self._call(partial(_fail, [ticket], _failure(error)))
                return
            self._running[ticket.request_id] = ticket

    def _abort(self, tickets: list[Ticket]) -> None:
        """Those that have ended meanwhile are left alone."""
        for ticket in tickets:
            if self._running.pop(ticket.request_id, None) is not None:
                self._engine.abort(ticket.request_id)

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


def _feed(news: list[tuple[Ticket, Delta]]) -> None:
    for ticket, delta in news:
        if not ticket.ended:
            ticket.stream.feed(ticket, delta)


def _fail(tickets: list[Ticket], error: ApiError) -> None:
    for ticket in tickets:
        ticket.stream.fail(error)


def _failure(error: Exception) -> ApiError:
    return ApiError(500, f"the engine failed ({type(error).__name__})", code="engine_failed")
